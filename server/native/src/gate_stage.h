// Which adapters act on each token of a step with which weight: routed, or fixed by the plan.
#pragma once

#include "stage.h"

namespace lm {

template <class T>
class GateStage : public Stage<T> {
  public:
    using Stage<T>::Stage;

  protected:
    using Own = Scratch<T>;
    using Stage<T>::shape_;
    using Stage<T>::step_;
    using Stage<T>::team_;

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
        has_shortlist_ = false;
        for (int r = 0; r < step.num_routers; ++r) has_shortlist_ = has_shortlist_ || step.routers[r].shortlist;
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

    // Gates of tokens [first, first + count) for one group of projections; `input` has rows of `lda` values.
    void route(Own& own, int layer, Group group, const Left<T>* input, int64_t lda, int64_t first, int64_t count) {
        if (!has_gates_) return;
        const Step& step = *step_;
        for (int64_t t = first, stop; t < first + count; t = stop) {
            const int32_t index = plan_of(t).router;
            stop = t + 1;
            while (stop < first + count && stop - t < kTileRows && plan_of(stop).router == index) ++stop;
            if (index < 0) continue;
            const Router& router = step.routers[index];
            if (router.is_per_layer) {
                if (group.first == kQ) decide(own, layer, kQ, input, lda, t, stop, router, layer_gates_);
                for (int i = 0; has_projection_router_ && i < group.count; ++i)
                    for (int64_t r = t; r < stop; ++r) gates_[i].copy(r, layer_gates_);
            } else {
                for (int i = 0; i < group.count; ++i)
                    decide(own, layer, group.first + i, input, lda, t, stop, router, gates_[i]);
            }
        }
    }

    // Tokens that a thread takes at a time where it routes them: a few share one product with the prototypes.
    int64_t routed_at_once() const {
        const int64_t share = (step_->num_tokens + team_.size() - 1) / team_.size();
        return has_shortlist_ ? std::min<int64_t>(4, share) : 1;
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

    bool has_gates_ = false, has_projection_router_ = false, has_shortlist_ = false;
    GateSet layer_gates_;  // of a router with one gate a layer, and of fixed plans
    GateSet gates_[3];     // per projection of a group, only if some router has a gate for each

  private:
    const Plan& plan_of(int64_t token) const { return step_->plans[step_->plan_of_token[token]]; }

    // Gates of tokens [first, stop), at most kTileRows, of one router for one projection.
    void decide(Own& own, int layer, int projection, const Left<T>* input, int64_t lda, int64_t first, int64_t stop,
                const Router& router, GateSet& out) {
        const int gate = layer * kNumProjections + projection;
        for (int64_t t = first; t < stop; ++t) out.count[t] = 0;
        if (router.gate_index[gate] < 0) return;
        const auto* shortlist = static_cast<const ShortlistRouter<T>*>(router.shortlist);
        bool is_served = false;
        for (int64_t t = first; shortlist && t < stop; ++t) is_served = is_served || shortlist->serves(plan_of(t));
        std::vector<float>& scores = own.shortlist.scores;
        if (is_served) {
            const Packed<T>& rows = shortlist->gates[gate].rows;
            scores.resize(kTileRows * shortlist->width());
            multiply_panels<T>(input + first * lda, lda, stop - first, rows, 0, rows.num_panels(), scores.data(),
                            shortlist->width());
        }
        for (int64_t t = first; t < stop; ++t) {
            const Plan& plan = plan_of(t);
            const Left<T>* x = input + t * lda;
            const bool is_short =
                is_served && shortlist->serves(plan) &&
                make_shortlist(*shortlist, shortlist->gates[gate], router.biases[gate], plan,
                               scores.data() + (t - first) * shortlist->width(), length_of(x, shape_.d_in(projection)),
                               own.shortlist);
            const int32_t* allowed = is_short ? own.shortlist.slots.data() : plan.slots;
            const int32_t num_allowed = is_short ? static_cast<int32_t>(own.shortlist.slots.size()) : plan.num_slots;
            int32_t* slots = &out.slot[t * out.capacity];
            float* weights = &out.weight[t * out.capacity];
            out.count[t] = top_k_gates(x, shape_.d_in(projection), router, gate, allowed, num_allowed, plan.top_k, slots,
                                       weights);
            note(router, gate, t, out.count[t], slots, weights);
        }
    }

    // For traces and traffic.
    void note(const Router& router, int gate, int64_t t, int32_t count, const int32_t* slots, const float* weights) {
        const int64_t num_slots = step_->num_slots;
        for (int32_t i = 0; i < count; ++i) {
            if (step_->share) step_->share[t * num_slots + slots[i]] += weights[i];
            if (router.layer_gates)
                router.layer_gates[(int64_t{router.gate_index[gate]} * step_->num_tokens + t) * num_slots + slots[i]] =
                    weights[i];
        }
    }
};

}  // namespace lm
