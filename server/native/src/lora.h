// The adapters' part of a step: gated updates through rank space.
//
// y += B (g * (A x)) touches only the adapters that act on a token, so its cost follows k, not how many are registered.
#pragma once

#include "gate_stage.h"

namespace lm {

template <class T>
class LoraStage : public GateStage<T> {
  public:
    using GateStage<T>::GateStage;

  protected:
    using Own = Scratch<T>;
    using Stage<T>::shape_;
    using Stage<T>::step_;
    using Stage<T>::team_;
    using Stage<T>::scratch_;
    using GateStage<T>::gates_;
    using GateStage<T>::has_gates_;
    using GateStage<T>::has_projection_router_;
    using GateStage<T>::layer_gates_;

    // Rank space of a group: for each projection and each (token, adapter) the row g * (A x), padded to lanes of B.
    void lora_down(Own& own, int layer, Group group, const Left<T>* input, int64_t lda) {
        if (!has_gates_) return;
        list_updates(own, layer, group);
        if (own.units.empty()) return;
        if (own.hidden_size > hidden_.size()) {
            // Only one thread may grow what all read. Sizes settle after a few steps, and so do these barriers.
            team_.barrier();
            if (&own == &scratch_[0]) hidden_.resize(own.hidden_size);
            team_.barrier();
        }
        own.gathered_tokens = nullptr;
        this->take(own, static_cast<int64_t>(own.units.size()), has_projection_router_ ? 1 : group.count,
                   [&](int64_t first, int64_t count) {
                       for (int64_t unit = first; unit < first + count; ++unit)
                           lora_down_unit(own, own.units[unit], input, lda);
                   });
    }

    // Add a projection's updates to `out` (rows, ldc), the results of its columns [from, from + columns) for tokens
    // [begin, begin + num_rows): adapters in the step's order.
    void lora_up(Own& own, int index, int64_t from, int64_t columns, int64_t begin, int64_t num_rows, float* out,
                 int64_t ldc) {
        if (own.updates[index].empty()) return;
        const MixedTiles tiles(own.most_rows);
        for (const Update<T>& update : own.updates[index]) {
            const int32_t* tokens = update.tokens;
            int64_t entry = 0, stop = update.count;
            if (num_rows < step_->num_tokens) {
                entry = std::lower_bound(tokens, tokens + update.count, begin) - tokens;
                stop = std::lower_bound(tokens + entry, tokens + update.count, begin + num_rows) - tokens;
            }
            const int64_t width = update.pair->width();
            for (; entry < stop; entry += kUpdateRows<T>) {
                const int64_t now = std::min<int64_t>(kUpdateRows<T>, stop - entry);
                add_update(own, *update.pair, hidden_.get() + update.hidden + entry * width, tokens + entry, now, from,
                           columns, begin, out, ldc);
            }
        }
    }

  private:
    const LoraPair<T>& pair(int layer, int projection, int32_t slot) const {
        return static_cast<const Adapter<T>*>(step_->adapters[slot])->pair(layer, projection);
    }

    // Group the tokens by adapter, lay out rank space and cut the work: each thread for itself, all with one result.
    void list_updates(Own& own, int layer, Group group) {
        const Step& step = *step_;
        own.hidden_size = 0;
        own.units.clear();
        own.most_rows = 0;
        int64_t widest = 0;
        for (int i = 0; i < group.count; ++i) own.updates[i].clear();
        // Projections whose tokens are grouped alike stand next to each other in every unit of work.
        const int together = has_projection_router_ ? 1 : group.count;
        for (int start = 0; start < group.count; start += together) {
            Grouping& grouping = own.groupings[start];
            if (has_projection_router_)
                grouping.build(gates_[start], step);
            else if (group.first == kQ)  // the layer's other groups reuse it
                grouping.build(layer_gates_, step);
            for (size_t g = 0; g < grouping.slots.size(); ++g) {
                const int32_t first = grouping.first[g], count = grouping.first[g + 1] - first;
                int32_t projections[3], num_projections = 0;
                for (int i = start; i < start + together; ++i) {
                    const LoraPair<T>& lora = pair(layer, group.first + i, grouping.slots[g]);
                    if (lora.rank == 0) continue;
                    own.updates[i].push_back(
                        {&lora, &grouping.token[first], &grouping.weight[first], count, own.hidden_size});
                    own.hidden_size += count * lora.width();
                    own.most_rows = std::max<int64_t>(own.most_rows, count);
                    widest = std::max(widest, lora.width());
                    projections[num_projections++] = i;
                }
                for (int32_t entry = 0; entry < count; entry += kUnitRows<T>)
                    for (int32_t p = 0; p < num_projections; ++p)
                        own.units.push_back(
                            {projections[p], static_cast<int32_t>(own.updates[projections[p]].size()) - 1, entry});
            }
        }
        own.hidden_size += kUpdateRows<T> * widest;  // whole tiles are read
    }

    void lora_down_unit(Own& own, const Unit& unit, const Left<T>* input, int64_t lda) {
        const Update<T>& update = own.updates[unit.projection][unit.update];
        const LoraPair<T>& lora = *update.pair;
        const int64_t count = std::min<int64_t>(kUnitRows<T>, update.count - unit.entry), width = lora.width();
        const int32_t* tokens = update.tokens + unit.entry;
        const Left<T>* left = input + tokens[0] * lda;
        if (tokens[count - 1] - tokens[0] != count - 1) {  // not neighbours
            if (own.gathered_tokens != tokens)  // else they are those of the unit before
                for (int64_t r = 0; r < count; ++r)
                    std::copy_n(input + tokens[r] * lda, lora.a.steps * Lane<T>::KP, own.gathered.get() + r * lda);
            own.gathered_tokens = tokens;
            left = own.gathered.get();
        }
        Left<T>* out = hidden_.get() + update.hidden + unit.entry * width;
        float* narrow = own.narrow.get();
        const MixedTiles tiles(count);
        constexpr int64_t kAtOnce = 4;  // panels of 16
        for (int64_t panel = 0; panel < lora.a.num_panels(); panel += kAtOnce) {
            const int64_t now = std::min(kAtOnce, lora.a.num_panels() - panel), ldc = now * kVec;
            if constexpr (kHasTiles<T>)
                multiply_narrow_tiles(left, lda, count, lora.a, panel, now, narrow, ldc);
            else
                multiply_panels<T>(left, lda, count, lora.a, panel, now, narrow, ldc);
            const int64_t first = panel * kVec, stop = std::min<int64_t>(width, first + ldc);
            for (int64_t r = 0; r < count; ++r) {
                const float gate = update.weights[unit.entry + r];
                const float* from = narrow + r * ldc - first;
                Left<T>* to = out + r * width;
                int64_t k = first;
                for (; k + kVec <= stop; k += kVec) store_left<T>(to + k, load16(from + k) * all(gate));
                for (; k < stop; ++k) store_left<T>(to + k, gate * from[k]);
            }
        }
    }

    // out += B hidden for up to kUpdateRows tokens. Sums go on from what `out` holds, in any arrangement of the tokens.
    void add_update(Own& own, const LoraPair<T>& lora, const Left<T>* hidden, const int32_t* tokens, int64_t count,
                    int64_t from, int64_t columns, int64_t begin, float* out, int64_t ldc) {
        const int64_t width = lora.width(), first = from / kPanel, stop = (from + columns + kPanel - 1) / kPanel;
        // Whole panels of neighbours need no copy; the matrix unit writes all rows of a tile, so there must be as many.
        if (from % kPanel == 0 && columns % kPanel == 0 && tokens[count - 1] - tokens[0] == count - 1 &&
            (!kHasTiles<T> || count == kUpdateRows<T>)) {
            add_panels(hidden, width, count, lora.b, first, stop - first, out + (tokens[0] - begin) * ldc, ldc);
            return;
        }
        float* narrow = own.narrow.get();
        for (int64_t panel = first; panel < stop; ++panel) {
            const int64_t low = std::max(panel * kPanel, from), high = std::min((panel + 1) * kPanel, from + columns);
            float* place = out + low - from;
            copy_columns(place, ldc, tokens, begin, count, narrow + low % kPanel, high - low, true);
            add_panels(hidden, width, count, lora.b, panel, 1, narrow, kPanel);
            copy_columns(place, ldc, tokens, begin, count, narrow + low % kPanel, high - low, false);
        }
    }

    static void add_panels(const Left<T>* hidden, int64_t width, int64_t count, const Packed<T>& b, int64_t first,
                           int64_t num_panels, float* out, int64_t ldc) {
        if constexpr (kHasTiles<T>)
            for (int64_t i = 0; i < num_panels; ++i) add_mixed_tiles(hidden, width, b, first + i, out + i * kPanel, ldc);
        else
            multiply_panels<T>(hidden, width, count, b, first, num_panels, out, ldc, true);
    }

    // Columns of the tokens' rows of `out` into rows of a panel, or back.
    static void copy_columns(float* out, int64_t ldc, const int32_t* tokens, int64_t begin, int64_t count, float* narrow,
                             int64_t columns, bool is_load) {
        for (int64_t r = 0; r < count; ++r) {
            float* row = out + (tokens[r] - begin) * ldc;
            float* to = is_load ? narrow + r * kPanel : row;
            const float* from = is_load ? row : narrow + r * kPanel;
            if (columns == kPanel) {
                store16(to, load16(from));
                store16(to + kVec, load16(from + kVec));
            } else {
                std::memcpy(to, from, columns * sizeof(float));
            }
        }
    }

    Buffer<Left<T>> hidden_;  // rank space of one group of projections
};

}  // namespace lm
