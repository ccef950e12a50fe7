// Gates: which adapters act on each token with which weight, and tokens grouped by adapter.
#pragma once

#include <algorithm>
#include <vector>

#include "model.h"

namespace lm {

// Gates of all tokens of a step for one projection (or one layer): up to `capacity` (slot, weight) a token, by slot.
struct GateSet {
    int64_t capacity = 0;
    std::vector<int32_t> count, slot;
    std::vector<float> weight;

    void resize(int64_t tokens, int64_t per_token) {
        capacity = per_token;
        count.assign(tokens, 0);
        slot.resize(tokens * per_token);
        weight.resize(tokens * per_token);
    }
    void copy(int64_t token, const GateSet& from) {
        count[token] = from.count[token];
        std::copy_n(&from.slot[token * capacity], from.count[token], &slot[token * capacity]);
        std::copy_n(&from.weight[token * capacity], from.count[token], &weight[token * capacity]);
    }
};

// Dot products of `x` (n,) with N rows, each summed as if it were alone.
template <int N, class T>
inline void dots(const T* x, const float* const* rows, int64_t n, float* out) {
    Vec sums[N][2];
    for (int i = 0; i < N; ++i) sums[i][0] = sums[i][1] = zeros();
    int64_t k = 0;
    for (; k + 2 * kVec <= n; k += 2 * kVec) {
        const Vec low = load16(x + k), high = load16(x + k + kVec);
        for (int i = 0; i < N; ++i) {
            sums[i][0] = multiply_add(low, load(rows[i] + k), sums[i][0]);
            sums[i][1] = multiply_add(high, load(rows[i] + k + kVec), sums[i][1]);
        }
    }
    for (int i = 0; i < N; ++i) {
        out[i] = sum_of(sums[i][0] + sums[i][1]);
        for (int64_t j = k; j < n; ++j) out[i] = std::fma(to_float(x[j]), rows[i][j], out[i]);
    }
}

// Logits of up to four slots from `slots`, biases and temperature included.
template <class T>
inline void slot_logits(const T* x, int64_t d_in, const Router& router, int gate, const int32_t* slots, int count,
                        float* out) {
    const float* rows[4];
    for (int i = 0; i < count; ++i) rows[i] = router.rows[gate] + slots[i] * d_in;
    constexpr int kAtOnce = kHasManyRegisters ? 4 : 2;
    int i = 0;
    for (; i + kAtOnce <= count; i += kAtOnce) dots<kAtOnce>(x, rows + i, d_in, out + i);
    for (; i < count; ++i) dots<1>(x, rows + i, d_in, out + i);
    for (int i = 0; i < count; ++i) {
        if (router.biases[gate]) out[i] += router.biases[gate][slots[i]];
        out[i] /= router.temperature;
    }
}

// One token's gates from router logits: mask, keep the `top_k` largest (ties to the lower slot), softmax over the kept.
// The maths of `server.routing.ops.top_k_gates`. `allowed` are `num_allowed` slots, ascending. Writes (slot, weight) by
// ascending slot; returns how many: none where the greatest logit is not finite.
template <class T>
int32_t top_k_gates(const T* x, int64_t d_in, const Router& router, int gate, const int32_t* allowed,
                    int32_t num_allowed, int32_t top_k, int32_t* slots, float* weights) {
    int32_t kept = 0;
    float logits[4];
    for (int32_t i = 0; i < num_allowed; ++i) {
        if (i % 4 == 0) slot_logits(x, d_in, router, gate, allowed + i, std::min(4, num_allowed - i), logits);
        const int32_t slot = allowed[i];
        const float logit = logits[i % 4];
        if (std::isnan(logit)) return 0;
        if (!(logit > kMinusInf)) continue;
        // Kept ones stand by falling logit; an equal logit goes behind, for slots come in ascending order.
        int32_t place = kept < top_k ? kept : top_k;
        while (place > 0 && weights[place - 1] < logit) --place;
        if (place >= top_k) continue;
        kept = std::min(kept + 1, top_k);
        for (int32_t j = kept - 1; j > place; --j) {
            weights[j] = weights[j - 1];
            slots[j] = slots[j - 1];
        }
        weights[place] = logit;
        slots[place] = slot;
    }
    const float greatest = kept ? weights[0] : 0.0f;
    if (std::isinf(greatest)) return 0;
    float total = 0.0f;
    for (int32_t j = 0; j < kept; ++j) total += weights[j] = std::exp(weights[j] - greatest);
    for (int32_t j = 0; j < kept; ++j) weights[j] /= total;
    for (int32_t i = 1; i < kept; ++i)  // by slot
        for (int32_t j = i; j > 0 && slots[j - 1] > slots[j]; --j) {
            std::swap(slots[j - 1], slots[j]);
            std::swap(weights[j - 1], weights[j]);
        }
    return kept;
}

// Tokens by slot: slot i of `slots` owns entries first[i] .. first[i + 1] of `token` and `weight`, tokens ascending. Slots
// stand in the order in which their updates are added up.
struct Grouping {
    std::vector<int32_t> slots, first, token;
    std::vector<float> weight;

    void build(const GateSet& gates, const Step& step) {
        const int64_t tokens = step.num_tokens;
        cursor_.assign(step.num_slots + 1, 0);
        for (int64_t t = 0; t < tokens; ++t)
            for (int32_t i = 0; i < gates.count[t]; ++i) ++cursor_[gates.slot[t * gates.capacity + i]];
        slots.clear();
        first.clear();
        int32_t total = 0;
        for (int32_t i = 0; i < step.num_slots; ++i) {
            const int32_t s = step.slot_order[i], count = step.adapters[s] ? cursor_[s] : 0;
            cursor_[s] = count ? total : -1;
            if (!count) continue;
            slots.push_back(s);
            first.push_back(total);
            total += count;
        }
        first.push_back(total);
        token.resize(total);
        weight.resize(total);
        for (int64_t t = 0; t < tokens; ++t)
            for (int32_t i = 0; i < gates.count[t]; ++i) {
                int32_t& place = cursor_[gates.slot[t * gates.capacity + i]];
                if (place < 0) continue;
                token[place] = static_cast<int32_t>(t);
                weight[place++] = gates.weight[t * gates.capacity + i];
            }
    }
    int64_t num_entries() const { return static_cast<int64_t>(token.size()); }

  private:
    std::vector<int32_t> cursor_;
};

}  // namespace lm
