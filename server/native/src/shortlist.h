// Shortlists of large pools: which slots can be among a token's top k at all, so that the router need not look at all.
//
// One product of some tokens with the gate rows in the compute type (the prototypes) gives a score of every slot, and
// what rounding can make of it bounds the logit from both sides. Whoever's upper bound is below the k-th greatest lower
// bound cannot be chosen; the router decides among the others as it would among all, to the last bit.
#pragma once

#include "routing.h"

namespace lm {

constexpr float kTiny = 1e-30f;  // products of subnormal numbers may be lost

// The prototypes of one gate.
template <class T>
struct Prototypes {
    Packed<T> rows;            // (P, d_in)
    std::vector<float> slack;  // (P,): |logit - score| for an input of length 1, at most
};

// The prototypes of a router's slots, in the order of the slots.
template <class T>
struct ShortlistRouter {
    std::vector<Prototypes<T>> gates;  // layers x projections; empty where there is no gate
    std::vector<int32_t> place;        // by slot: its prototype, or -1
    int64_t num_slots = 0;             // P

    int64_t width() const { return round_up(num_slots, kPanel); }  // columns of the scores
    // A product with all prototypes pays unless the pool is a small part of them.
    bool serves(const Plan& plan) const { return 2 * plan.num_slots >= num_slots; }
};

// Prototypes of `slots` (ascending) from float32 gate rows (E, d_in). The slack is proven, not guessed:
// |w x - w' x'| <= |w - w'| |x| for the rounded row; d 2^-24 |w| |x| for each of the two float32 sums; and 2^-21 |w| |x|,
// twice what adding a bias, the bounds themselves and dividing by the temperature can round. The factor is for this sum.
template <class T>
void fill_prototypes(Prototypes<T>& out, const float* rows, int64_t d_in, const std::vector<int32_t>& slots) {
    const int64_t count = static_cast<int64_t>(slots.size());
    out.rows.allocate(count, d_in, kPanel, kDepthUnit);
    out.slack.resize(count);
    for (int64_t p = 0; p < count; ++p) {
        const float* row = rows + slots[p] * d_in;
        out.rows.fill(p, 1, row, d_in);
        double length = 0, lost = 0;
        for (int64_t k = 0; k < d_in; ++k) {
            const double exact = row[k], left = exact - out.rows.value(p, k);
            length += exact * exact;
            lost += left * left;
        }
        const double rounding = std::ldexp(static_cast<double>(d_in), -23) + std::ldexp(1.0, -21);
        out.slack[p] = static_cast<float>(1.001 * (std::sqrt(lost) + rounding * std::sqrt(length)));
    }
}

// What a thread needs to make shortlists.
struct ShortlistScratch {
    std::vector<float> scores, lower, upper, greatest;
    std::vector<int32_t> slots;
};

// The k-th greatest of n values; minus infinity where there are fewer. `greatest` is scratch.
inline float kth_greatest(const float* values, int32_t n, int32_t k, std::vector<float>& greatest) {
    greatest.assign(k, kMinusInf);  // rising
    for (int32_t i = 0; i < n; i += kVec) {
        const Vec block = load_some(lanes_below(n - i), values + i, all(kMinusInf));
        uint32_t higher = bits_of(is_greater(block, all(greatest[0])));
        for (; higher; higher &= higher - 1) {
            const float value = values[i + __builtin_ctz(higher)];
            if (!(value > greatest[0])) continue;
            int32_t j = 0;
            for (; j + 1 < k && greatest[j + 1] < value; ++j) greatest[j] = greatest[j + 1];
            greatest[j] = value;
        }
    }
    return greatest[0];
}

// At least the length of `x` (n,).
template <class T>
float length_of(const T* x, int64_t n) {
    Vec squares = zeros();
    int64_t k = 0;
    for (; k + kVec <= n; k += kVec) squares = multiply_add(load16(x + k), load16(x + k), squares);
    float total = sum_of(squares);
    for (; k < n; ++k) total += to_float(x[k]) * to_float(x[k]);
    return 1.001f * std::sqrt(total);
}

// Slots of the plan, ascending, that hold its top k for certain, into own.slots. False where the numbers are not
// finite, so that nothing is certain. `scores` are the token's, `length` its input's.
template <class T>
bool make_shortlist(const ShortlistRouter<T>& router, const Prototypes<T>& prototypes, const float* biases,
                    const Plan& plan, const float* scores, float length, ShortlistScratch& own) {
    const Vec rounding = all(1.0f / (1 << 21)), tiny = all(kTiny), zero = zeros();
    const bool is_whole = plan.num_slots == router.num_slots;
    own.lower.resize(round_up(plan.num_slots, kVec));
    own.upper.resize(own.lower.size());
    Vec poison = all(length * 0.0f);
    for (int32_t i = 0; i < plan.num_slots; i += kVec) {
        const Mask inside = lanes_below(plan.num_slots - i);
        const IntVec slots = load_some(inside, plan.slots + i);
        Vec score, slack;
        if (is_whole) {
            score = load_some(inside, scores + i, zero);
            slack = load_some(inside, prototypes.slack.data() + i, zero);
        } else {
            const IntVec places = gather(inside, router.place.data(), slots);
            score = gather(inside, scores, places);
            slack = gather(inside, prototypes.slack.data(), places);
        }
        const Vec bias = biases ? gather(inside, biases, slots) : zero;
        const Vec margin = multiply_add(slack, all(length), multiply_add(absolute(bias), rounding, tiny));
        score = score + bias;
        const Vec lower = score - margin, upper = score + margin;
        poison = multiply_add(lower, zero, multiply_add(upper, zero, poison));
        store_some(&own.lower[i], inside, lower);
        store_some(&own.upper[i], inside, upper);
    }
    if (bits_of(is_equal(poison, zero)) != 0xffff) return false;
    const Vec bound = all(kth_greatest(own.lower.data(), plan.num_slots, plan.top_k, own.greatest));
    own.slots.clear();
    for (int32_t i = 0; i < plan.num_slots; i += kVec) {
        const Mask inside = lanes_below(plan.num_slots - i);
        uint32_t may_win = bits_of(inside & is_at_least(load_some(inside, &own.upper[i], zero), bound));
        for (; may_win; may_win &= may_win - 1) own.slots.push_back(plan.slots[i + __builtin_ctz(may_win)]);
    }
    return true;
}

}  // namespace lm
