// The adapters' part of a step: gates of each token, and gated updates through rank space.
//
// y += B (g * (A x)) touches only the adapters that act on a token, so its cost follows k, not how many are registered.
#pragma once

#include "stage.h"

namespace lm {

template <class T>
class LoraStage : public Stage<T> {
  public:
    using Stage<T>::Stage;

  protected:
    using Own = Scratch<T>;
    using Stage<T>::shape_;
    using Stage<T>::step_;
    using Stage<T>::team_;
    using Stage<T>::scratch_;

    void begin(const Step& step) {
        Stage<T>::begin(step);
        int64_t most = 1;
        has_gates_ = has_projection_router_ = false;
        for (int p = 0; p < step.num_plans; ++p) {
            const Plan& plan = step.plans[p];
            has_gates_ = has_gates_ || plan.num_slots > 0;
            if (plan.router >= 0 && !step.routers[plan.router].is_per_layer) has_projection_router_ = true;
            most = std::max<int64_t>(most, plan.router >= 0 ? plan.top_k : plan.num_slots);
        }
        if (!has_gates_) return;
        for (GateSet* gates : {&layer_gates_, &gates_[0], &gates_[1], &gates_[2]}) {
            gates->resize(step.num_tokens, most);
            for (int64_t t = 0; t < step.num_tokens; ++t) {
                const Plan& plan = step.plans[step.plan_of_token[t]];
                if (plan.router >= 0) continue;
                gates->count[t] = plan.num_slots;
                std::copy_n(plan.slots, plan.num_slots, &gates->slot[t * most]);
                std::copy_n(plan.weights, plan.num_slots, &gates->weight[t * most]);
            }
            if (!has_projection_router_) break;
        }
    }

    // ---- gates -------------------------------------------------------------------------------------------------

    // Gates of a routed token for one group of projections whose input is `x`.
    void route(int layer, Group group, const T* x, int64_t t) {
        const Step& step = *step_;
        if (!has_gates_) return;
        const Plan& plan = step.plans[step.plan_of_token[t]];
        if (plan.router < 0) return;
        const Router& router = step.routers[plan.router];
        if (router.is_per_layer) {
            if (group.first == kQ) decide(layer, kQ, x, t, router, plan, layer_gates_);
            if (has_projection_router_)
                for (int i = 0; i < group.count; ++i) gates_[i].copy(t, layer_gates_);
            return;
        }
        for (int i = 0; i < group.count; ++i) decide(layer, group.first + i, x, t, router, plan, gates_[i]);
    }

    void decide(int layer, int projection, const T* x, int64_t t, const Router& router, const Plan& plan, GateSet& out) {
        const int gate = layer * kNumProjections + projection;
        out.count[t] = 0;
        if (router.gate_index[gate] < 0) return;
        int32_t* slots = &out.slot[t * out.capacity];
        float* weights = &out.weight[t * out.capacity];
        const int32_t count = top_k_gates(x, shape_.d_in(projection), router, gate, plan, slots, weights);
        out.count[t] = count;
        const int64_t num_slots = step_->num_slots;
        for (int32_t i = 0; i < count; ++i) {
            if (step_->share) step_->share[t * num_slots + slots[i]] += weights[i];
            if (router.layer_gates)
                router.layer_gates[(int64_t{router.gate_index[gate]} * step_->num_tokens + t) * num_slots + slots[i]] =
                    weights[i];
        }
    }

    void finish_share() const {
        const Step& step = *step_;
        for (int64_t t = 0; t < step.num_tokens; ++t) {
            const Plan& plan = step.plans[step.plan_of_token[t]];
            float* share = step.share + t * step.num_slots;
            if (plan.router < 0) {
                for (int32_t i = 0; i < plan.num_slots; ++i) share[plan.slots[i]] = plan.weights[i];
            } else {
                const float num_gates = static_cast<float>(std::max(1, step.routers[plan.router].num_gates));
                for (int32_t i = 0; i < plan.num_slots; ++i) share[plan.slots[i]] /= num_gates;
            }
        }
    }

    // ---- adapters ----------------------------------------------------------------------------------------------

    const LoraPair<T>& pair(int layer, int projection, int32_t slot) const {
        return static_cast<const Adapter<T>*>(step_->adapters[slot])->pair(layer, projection);
    }
    static int64_t rank_width(const LoraPair<T>& pair) { return pair.b.steps * Lane<T>::KP; }

    // Rank space of a group: for each projection and each (token, adapter) the row g * (A x), padded to lanes of B.
    void lora_down(Own& own, int layer, Group group, const T* input, int64_t lda) {
        if (!has_gates_) return;
        const int64_t units = group_tokens(own, layer, group);
        if (units == 0) return;
        if (own.hidden_size > hidden_.size()) {
            // Only one thread may grow what all read. Sizes settle after a few steps, and so do these barriers.
            team_.barrier();
            if (&own == &scratch_[0]) hidden_.resize(own.hidden_size);
            team_.barrier();
        }
        this->take(own, units, 1, [&](int64_t unit, int64_t) { lora_down_unit(own, layer, group, unit, input, lda); });
    }

    const Grouping& grouping_of(const Own& own, int index) const {
        return own.groupings[has_projection_router_ ? index : 0];
    }

    // Group the tokens by adapter (each thread for itself) and lay out rank space. Returns the work units of the group:
    // one per tile of tokens of each (projection, adapter).
    int64_t group_tokens(Own& own, int layer, Group group) {
        const Step& step = *step_;
        int64_t at = 0, units = 0;
        for (int i = 0; i < group.count; ++i) {
            if (has_projection_router_)
                own.groupings[i].build(gates_[i], step.num_tokens, step.num_slots, step.adapters);
            else if (group.first == kQ && i == 0)  // the layer's other groups reuse it
                own.groupings[0].build(layer_gates_, step.num_tokens, step.num_slots, step.adapters);
            const Grouping& grouping = grouping_of(own, i);
            own.hidden_first[i] = at;
            for (size_t g = 0; g < grouping.slots.size(); ++g) {
                const LoraPair<T>& lora = pair(layer, group.first + i, grouping.slots[g]);
                if (lora.rank == 0) continue;
                const int64_t count = grouping.first[g + 1] - grouping.first[g];
                at += count * rank_width(lora);
                units += (count + kTileRows - 1) / kTileRows;
            }
        }
        own.hidden_size = at;
        return units;
    }

    void lora_down_unit(Own& own, int layer, Group group, int64_t unit, const T* input, int64_t lda) {
        for (int i = 0; i < group.count; ++i) {
            const Grouping& grouping = grouping_of(own, i);
            int64_t at = own.hidden_first[i];
            for (size_t g = 0; g < grouping.slots.size(); ++g) {
                const LoraPair<T>& lora = pair(layer, group.first + i, grouping.slots[g]);
                if (lora.rank == 0) continue;
                const int64_t count = grouping.first[g + 1] - grouping.first[g];
                const int64_t tiles = (count + kTileRows - 1) / kTileRows;
                if (unit < tiles) {
                    const int64_t row = unit * kTileRows;
                    lora_down_tile(own, lora, grouping, grouping.first[g] + row,
                                   std::min<int64_t>(kTileRows, count - row), input, lda,
                                   hidden_.get() + at + row * rank_width(lora));
                    return;
                }
                unit -= tiles;
                at += count * rank_width(lora);
            }
        }
    }

    void lora_down_tile(Own& own, const LoraPair<T>& lora, const Grouping& grouping, int64_t entry, int64_t count,
                        const T* input, int64_t lda, T* out) {
        T* gathered = own.gathered.get();
        for (int64_t r = 0; r < count; ++r)
            std::memcpy(static_cast<void*>(gathered + r * lda), input + grouping.token[entry + r] * lda,
                        lora.a.steps * 4);
        const int64_t width = rank_width(lora);
        for (int64_t panel = 0; panel < lora.a.num_panels(); ++panel) {
            float* narrow = own.narrow.get();
            multiply_panels(gathered, lda, count, lora.a, panel, 1, narrow, kVec);
            const int64_t first = panel * kVec, stop = std::min<int64_t>(width, first + kVec);
            for (int64_t r = 0; r < count; ++r) {
                const float gate = grouping.weight[entry + r];
                for (int64_t k = first; k < stop; ++k) from_float(gate * narrow[r * kVec + k - first], out + r * width + k);
            }
        }
    }

    // Add a projection's updates to `out` (rows, ldc), the results of its columns [from, from + columns) for tokens
    // [begin, begin + num_rows): adapters in the order of their slots.
    void lora_up(Own& own, int layer, Group group, int index, int64_t from, int64_t columns, int64_t begin,
                 int64_t num_rows, float* out, int64_t ldc) {
        const Grouping& grouping = grouping_of(own, index);
        int64_t at = own.hidden_first[index];
        for (size_t g = 0; g < grouping.slots.size(); ++g) {
            const LoraPair<T>& lora = pair(layer, group.first + index, grouping.slots[g]);
            if (lora.rank == 0) continue;
            const int64_t width = rank_width(lora);
            const auto tokens = grouping.token.begin();
            const auto low = tokens + grouping.first[g], high = tokens + grouping.first[g + 1];
            int64_t entry = std::lower_bound(low, high, begin) - tokens;
            const int64_t stop = std::lower_bound(low, high, begin + num_rows) - tokens;
            for (; entry < stop; entry += kTileRows) {
                const int64_t now = std::min<int64_t>(kTileRows, stop - entry);
                const T* hidden = hidden_.get() + at + (entry - grouping.first[g]) * width;
                const int32_t* token = &grouping.token[entry];
                for (int64_t panel = from / kPanel; panel * kPanel < from + columns; ++panel) {
                    multiply_panels(hidden, width, now, lora.b, panel, 1, own.narrow.get(), kPanel);
                    for (int64_t r = 0; r < now; ++r)
                        add_columns(own.narrow.get() + r * kPanel, panel * kPanel, from, columns,
                                    out + (token[r] - begin) * ldc);
                }
            }
            at += (grouping.first[g + 1] - grouping.first[g]) * width;
        }
    }

    static void add_columns(const float* panel, int64_t column, int64_t from, int64_t columns, float* out) {
        if (column >= from && column + kPanel <= from + columns) {
            for (int v = 0; v < kPanel; v += kVec)
                store16(out + column - from + v, _mm512_add_ps(load16(out + column - from + v), load16(panel + v)));
            return;
        }
        const int64_t stop = std::min(column + kPanel, from + columns);
        for (int64_t c = std::max(column, from); c < stop; ++c) out[c - from] += panel[c - column];
    }

    bool has_gates_ = false, has_projection_router_ = false;

  private:
    Buffer<T> hidden_;       // rank space of one group of projections
    GateSet layer_gates_;    // of a router with one gate a layer, and of fixed plans
    GateSet gates_[3];       // per projection of a group, only if some router has a gate for each
};

}  // namespace lm
