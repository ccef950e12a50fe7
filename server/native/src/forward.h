// One step of a Llama-family decoder: tokens in, logits and gates out. All threads of the team run `work` together and
// meet at barriers between phases; inside a phase they take panels or rows from a shared counter.
#pragma once

#include <stdexcept>
#include <string>

#include "attention_stage.h"

namespace lm {

template <class T>
class Forward : public AttentionStage<T> {
  public:
    using AttentionStage<T>::AttentionStage;

    void run(const Step& step) {
        for (int32_t t = 0; t < step.num_tokens; ++t)
            if (step.token_ids[t] < 0 || step.token_ids[t] >= shape_.vocab)
                throw std::out_of_range("token " + std::to_string(step.token_ids[t]) + " is beyond the vocabulary");
        this->begin(step);
        team_.run([this](int id) { work(id); });
    }

  private:
    using Own = Scratch<T>;
    using Stage<T>::model_;
    using Stage<T>::shape_;
    using Stage<T>::team_;
    using Stage<T>::step_;
    using Stage<T>::scratch_;
    using Stage<T>::residual_;
    using Stage<T>::qkv_;
    using Stage<T>::normed_;
    using Stage<T>::attended_;
    using Stage<T>::activated_;
    using Stage<T>::int8_rows_;
    using Stage<T>::kRowsAtOnce;
    using Stage<T>::take;
    using Stage<T>::rows;
    using Stage<T>::row_pieces;
    using Stage<T>::panels;
    using Stage<T>::claim;
    using Stage<T>::depth;
    using Stage<T>::norm;
    using Stage<T>::normed_row;
    using GateStage<T>::route;
    using GateStage<T>::routed_at_once;
    using LoraStage<T>::lora_down;
    using LoraStage<T>::lora_up;
    using GateStage<T>::has_gates_;
    using GateStage<T>::has_projection_router_;
    using AttentionStage<T>::tasks_;
    using AttentionStage<T>::rotate_and_cache;
    using AttentionStage<T>::attend;

    void work(int id) {
        const TileScope tiles;
        Own& own = scratch_[id];
        const Step& step = *step_;
        rows(own, step.num_tokens, [&](int64_t t) {
            model_.embed(step.token_ids[t], residual_.get() + t * shape_.hidden);
        });
        for (int layer = 0; layer < shape_.layers; ++layer) {
            const Layer<T>& weights = model_.layers[layer];
            row_pieces(own, step.num_tokens, routed_at_once(), [&](int64_t first, int64_t count) {
                for (int64_t t = first; t < first + count; ++t) {
                    norm(residual_.get() + t * shape_.hidden, weights.attention_norm, normed_row(t));
                    if (step.inputs) this->copy_input(layer, t);
                    round_row(normed_.get(), kQ, t);
                }
                route(own, layer, kAttentionIn, normed_.get(), depth(kQ), first, count);
            });
            lora_down(own, layer, kAttentionIn, normed_.get(), depth(kQ));
            panels(own, weights.qkv, [&](int64_t first, int64_t count) { project_qkv(own, layer, first, count); });
            rows(own, step.num_tokens, [&](int64_t t) { rotate_and_cache(layer, t); });
            take(own, static_cast<int64_t>(tasks_.size()), 1, [&](int64_t first, int64_t) { attend(own, layer, tasks_[first]); });
            if (has_projection_router_) route_all(own, layer, kAttentionOut, attended_.get());
            lora_down(own, layer, kAttentionOut, attended_.get(), depth(kO));
            round_rows(own, attended_.get(), kO);
            panels(own, weights.o, [&](int64_t first, int64_t count) {
                project_to_residual(own, layer, kAttentionOut, weights.o, attended_.get(), first, count);
            });
            row_pieces(own, step.num_tokens, routed_at_once(), [&](int64_t first, int64_t count) {
                for (int64_t t = first; t < first + count; ++t) {
                    norm(residual_.get() + t * shape_.hidden, weights.mlp_norm, normed_row(t));
                    round_row(normed_.get(), kGate, t);
                }
                if (has_projection_router_) route(own, layer, kMlpIn, normed_.get(), depth(kQ), first, count);
            });
            lora_down(own, layer, kMlpIn, normed_.get(), depth(kQ));
            panels(own, weights.gate, [&](int64_t first, int64_t count) { project_gate_up(own, layer, first, count); });
            if (has_projection_router_) route_all(own, layer, kMlpOut, activated_.get());
            lora_down(own, layer, kMlpOut, activated_.get(), depth(kDown));
            round_rows(own, activated_.get(), kDown);
            panels(own, weights.down, [&](int64_t first, int64_t count) {
                project_to_residual(own, layer, kMlpOut, weights.down, activated_.get(), first, count);
            });
        }
        if (step.share && id == 0) this->finish_share();
        rows(own, step.num_checks, [&](int64_t i) {
            step.finite[i] = is_finite(residual_.get() + int64_t{step.check_positions[i]} * shape_.hidden, shape_.hidden);
        });
        rows(own, step.num_logits, [&](int64_t i) {
            norm(residual_.get() + int64_t{step.logit_positions[i]} * shape_.hidden, model_.final_norm, normed_row(i));
            round_row(normed_.get(), kQ, i);
        });
        if (step.num_logits)
            panels(own, model_.head, [&](int64_t first, int64_t count) { project_logits(own, first, count); });
        if (id == 0) join_greatest();
    }

    void route_all(Own& own, int layer, Group group, const Left<T>* input) {
        row_pieces(own, step_->num_tokens, routed_at_once(), [&](int64_t first, int64_t count) {
            route(own, layer, group, input, depth(group.first), first, count);
        });
    }

    // ---- projections -------------------------------------------------------------------------------------------

    // What int8 weights are multiplied with: the input of `projection`, a row of it, or in a phase of its own all of them.
    void round_row(const Left<T>* input, int projection, int64_t row) {
        if (shape_.is_int8) int8_rows_.store(row, input + row * depth(projection), depth(projection));
    }
    void round_rows(Own& own, const Left<T>* input, int projection) {
        if (shape_.is_int8) rows(own, step_->num_tokens, [&](int64_t t) { round_row(input, projection, t); });
    }

    // C (count rows, 32 num_panels) = rows of `input` from `begin` on times panels of the base model.
    void product(const Left<T>* input, int64_t lda, int64_t begin, int64_t count, const Linear<T>& weight, int64_t first,
                 int64_t num_panels, float* c, int64_t ldc, Ahead& ahead) const {
        if (weight.is_int8())
            multiply_int8(int8_rows_, begin, count, weight, first, num_panels, c, ldc);
        else
            multiply_weight(input + begin * lda, lda, count, weight.plain, first, num_panels, c, ldc, ahead);
    }

    // Base product plus updates of the projections whose columns lie in panels [first, first + count), in float32. They
    // belong into the same columns of `out`, rows of `stride` values: at once if `is_in_place`, else
    // `finish(place, rows, column, columns, results, ldc)` takes them there from a buffer.
    template <class Finish>
    void project(Own& own, Group group, const Linear<T>& weight, const Left<T>* input, int64_t first, int64_t count,
                 float* out, int64_t stride, bool is_in_place, Finish finish) {
        const int64_t tokens = step_->num_tokens, lda = depth(group.first), at_once = rows_at_once(own);
        // The matrix unit takes one panel after the other anyway.
        const int64_t panels_at_once = kHasTiles<T> ? 1 : count;
        for (int64_t panel = first; panel < first + count; panel += panels_at_once) {
            const int64_t column = panel * kPanel, width = panels_at_once * kPanel;
            const bool is_last = panel + panels_at_once == first + count;
            const T* next = is_last ? after(weight, first, count) : weight.panel(panel + 1);
            Ahead ahead(weight, panel, panels_at_once, next, tokens);
            const int64_t columns = std::min(width, stride - column);
            for (int64_t begin = 0; begin < tokens; begin += at_once) {
                const int64_t now = std::min(at_once, tokens - begin);
                float* place = out + begin * stride + column;
                float* results = is_in_place ? place : own.columns.get();
                const int64_t ldc = is_in_place ? stride : width;
                claim(place, stride, now, columns);
                product(input, lda, begin, now, weight, panel, panels_at_once, results, ldc, ahead);
                if (has_updates(own)) update(own, group, panel, panels_at_once, begin, now, results, ldc);
                if (!is_in_place) finish(place, now, column, columns, results, ldc);
            }
        }
    }

    bool has_updates(const Own& own) const { return has_gates_ && own.hidden_size > 0; }

    // Rows of a product whose results are taken on while they are in the first-level cache. Updates cost as much for a
    // few rows as for many.
    int64_t rows_at_once(const Own& own) const {
        return kHasTiles<T> && !has_updates(own) ? 2 * kTile : kRowsAtOnce;
    }

    // What a thread that took panels [first, first + count) will most likely take next, or null.
    const T* after(const Linear<T>& weight, int64_t first, int64_t count) const {
        const int64_t panel = first + count * team_.size();
        return panel < weight.num_panels() ? weight.panel(panel) : nullptr;
    }

    // q, k and v stand side by side in one matrix whose panels may straddle them; B has panels of its own.
    void update(Own& own, Group group, int64_t first, int64_t count, int64_t begin, int64_t num_rows,
                float* results, int64_t ldc) {
        for (int i = 0; i < group.count; ++i) {
            const int projection = group.first + i;
            const int64_t column = shape_.column(projection), stop = column + shape_.d_out(projection);
            const int64_t from = std::max(column, first * kPanel), to = std::min(stop, (first + count) * kPanel);
            if (from < to)
                lora_up(own, i, from - column, to - from, begin, num_rows, results + from - first * kPanel, ldc);
        }
    }

    void project_qkv(Own& own, int layer, int64_t first, int64_t count) {
        const int64_t width = shape_.qkv_width(), begin_column = first * kPanel;
        const int64_t columns = std::min(width - begin_column, count * kPanel);
        const bool is_whole = columns == count * kPanel;  // else the padding of the last panel would be the next row
        project(own, kAttentionIn, model_.layers[layer].qkv, normed_.get(), first, count, qkv_.get(), width, is_whole,
                [&](float* out, int64_t rows, int64_t, int64_t columns, const float* results, int64_t ldc) {
                    for (int64_t r = 0; r < rows; ++r) std::copy_n(results + r * ldc, columns, out + r * width);
                });
        for (int projection : {kQ, kK, kV}) add_bias(layer, projection, begin_column, columns);
    }

    void add_bias(int layer, int projection, int64_t begin_column, int64_t columns) {
        const std::vector<float>& bias = model_.layers[layer].bias[projection];
        if (bias.empty()) return;
        const int64_t column = shape_.column(projection);
        const int64_t from = std::max(column, begin_column);
        const int64_t to = std::min<int64_t>(column + bias.size(), begin_column + columns);
        for (int64_t t = 0; t < step_->num_tokens; ++t)
            for (int64_t c = from; c < to; ++c) qkv_.get()[t * shape_.qkv_width() + c] += bias[c - column];
    }

    void project_to_residual(Own& own, int layer, Group group, const Linear<T>& weight, const Left<T>* input,
                             int64_t first, int64_t count) {
        const std::vector<float>& bias = model_.layers[layer].bias[group.first];
        const int64_t width = shape_.hidden;
        project(own, group, weight, input, first, count, residual_.get(), width, false,
                [&](float* out, int64_t rows, int64_t column, int64_t columns, const float* results, int64_t ldc) {
                    for (int64_t r = 0; r < rows; ++r, out += width, results += ldc) {
                        for (int64_t c = 0; c < columns; ++c) out[c] += results[c];
                        if (!bias.empty())
                            for (int64_t c = 0; c < columns; ++c) out[c] += bias[column + c];
                    }
                });
    }

    // silu(gate) * up for one panel of each at a time: both results are at hand before they leave the caches.
    void project_gate_up(Own& own, int layer, int64_t first, int64_t count) {
        const Layer<T>& weights = model_.layers[layer];
        const Left<T>* input = normed_.get();
        const int64_t lda = depth(kQ), width = depth(kDown), tokens = step_->num_tokens;
        constexpr int64_t ldc = 2 * kPanel;
        for (int64_t panel = first; panel < first + count; ++panel) {
            const int64_t column = panel * kPanel, columns = std::min<int64_t>(shape_.intermediate - column, kPanel);
            Ahead to_up(weights.gate, panel, 1, weights.up.panel(panel), tokens);
            Ahead to_next(weights.up, panel, 1, after(weights.gate, panel, 1), tokens);
            for (int64_t begin = 0; begin < tokens; begin += kRowsAtOnce) {
                const int64_t stop = std::min(begin + kRowsAtOnce, tokens), at_once = rows_at_once(own);
                float* gate = own.columns.get();
                product(input, lda, begin, stop - begin, weights.gate, panel, 1, gate, ldc, to_up);
                for (int64_t row = begin; row < stop; row += at_once, gate += at_once * ldc) {
                    const int64_t now = std::min(at_once, stop - row);
                    Left<T>* out = activated_.get() + row * width + column;
                    claim(out, width, now, columns);
                    product(input, lda, row, now, weights.up, panel, 1, gate + kPanel, ldc, to_next);
                    if (has_updates(own))
                        for (int i = 0; i < 2; ++i) lora_up(own, i, column, columns, row, now, gate + i * kPanel, ldc);
                    for (int64_t r = 0; r < now; ++r) activate(layer, gate + r * ldc, column, columns, out + r * width);
                }
            }
        }
    }

    void activate(int layer, float* gate_up, int64_t begin_column, int64_t columns, Left<T>* out) const {
        for (int i = 0; i < 2; ++i)
            if (const auto& bias = model_.layers[layer].bias[kGate + i]; !bias.empty())
                for (int64_t c = 0; c < columns; ++c) gate_up[i * kPanel + c] += bias[begin_column + c];
        alignas(kCacheLine) Left<T> values[kPanel];
        for (int v = 0; v < kPanel; v += kVec) {
            const Vec x = load16(gate_up + v);
            // x * sigmoid(x) with an exponential that cannot overflow; NaN goes through.
            const Vec e = exp2_16(absolute(x) * all(-kLog2E)), one = all(1.0f);
            const Vec silu = x * (select(is_less(x, zeros()), e, one) / (one + e));
            store_left<T>(values + v, silu * load16(gate_up + kPanel + v));
        }
        std::copy_n(values, columns, out);
    }

    void project_logits(Own& own, int64_t first, int64_t count) {
        const int64_t begin_column = first * kPanel;
        const int64_t columns = std::min<int64_t>(shape_.vocab - begin_column, count * kPanel);
        for (int64_t begin = 0; begin < step_->num_logits; begin += kRowsAtOnce) {
            const int64_t now = std::min<int64_t>(kRowsAtOnce, step_->num_logits - begin);
            float* results = own.columns.get();
            Ahead ahead(model_.head, first, count, after(model_.head, first, count), now);
            product(normed_.get(), depth(kQ), begin, now, model_.head, first, count, results, count * kPanel, ahead);
            for (int64_t r = 0; r < now; ++r) {
                const float* row = results + r * count * kPanel;
                std::copy_n(row, columns, step_->logits + (begin + r) * shape_.vocab + begin_column);
                find_greatest(row, columns, begin_column, own.greatest[begin + r], own.greatest_id[begin + r]);
            }
        }
    }

    static void find_greatest(const float* row, int64_t columns, int64_t begin_column, float& greatest, int32_t& id) {
        Vec tops = all(kMinusInf);
        Mask found_nan = is_nan(tops);
        for (int64_t c = 0; c < columns; c += kVec) {
            const Vec x = load_some(lanes_below(columns - c), row + c, all(kMinusInf));
            tops = maximum(tops, x);
            found_nan = found_nan | is_nan(x);
        }
        if (bits_of(found_nan)) greatest = NAN;
        const float top = greatest_of(tops);
        if (!(top > greatest)) return;  // also once it is not a number
        greatest = top;
        id = static_cast<int32_t>(begin_column + (std::find(row, row + columns, top) - row));
    }

    void join_greatest() const {
        for (int32_t i = 0; i < step_->num_logits; ++i) {
            float greatest = kMinusInf;
            int32_t id = 0;
            for (const Own& own : scratch_) {
                const float value = own.greatest[i];
                const bool is_better = value > greatest || (value == greatest && own.greatest_id[i] < id);
                if (!is_better && !std::isnan(value)) continue;
                greatest = value;
                id = own.greatest_id[i];
                if (std::isnan(value)) break;
            }
            step_->greatest[i] = greatest;
            step_->greatest_id[i] = id;
        }
    }

};

}  // namespace lm
