// The attention part of a step: rotary positions, the cache's new rows, and who computes which queries.
#pragma once

#include "lora.h"

namespace lm {

template <class T>
class AttentionStage : public LoraStage<T> {
  public:
    using LoraStage<T>::LoraStage;

  protected:
    using Own = Scratch<T>;
    using Stage<T>::model_;
    using Stage<T>::shape_;
    using Stage<T>::cache_;
    using Stage<T>::step_;
    using Stage<T>::qkv_;
    using Stage<T>::query_;
    using Stage<T>::attended_;
    using Stage<T>::depth;

    // Queries of one sequence that one thread computes together: tokens x heads that share a K/V head.
    struct AttentionTask {
        int32_t sequence, kv_head, first_head, num_heads, first_token, num_tokens;
    };

    void begin(const Step& step) {
        LoraStage<T>::begin(step);
        list_tasks();
    }

    void list_tasks() {
        tasks_.clear();
        sequence_of_.resize(step_->num_tokens);
        const int32_t group = shape_.heads / shape_.kv_heads;
        const int32_t heads_at_once = std::min<int32_t>(group, kQueryRows<T>);
        const int32_t tokens_at_once = kQueryRows<T> / heads_at_once;
        for (int32_t s = 0; s < step_->num_sequences; ++s) {
            const int32_t stop = step_->first_token[s + 1];
            for (int32_t t = step_->first_token[s]; t < stop; ++t) sequence_of_[t] = s;
            for (int32_t head = 0; head < shape_.kv_heads; ++head)
                for (int32_t h = 0; h < group; h += heads_at_once)
                    for (int32_t t = step_->first_token[s]; t < stop; t += tokens_at_once)
                        tasks_.push_back({s, head, head * group + h, std::min(heads_at_once, group - h), t,
                                          std::min(tokens_at_once, stop - t)});
        }
    }

    const int32_t* blocks_of(int32_t sequence) const {
        return step_->block_tables + int64_t{sequence} * step_->max_blocks;
    }

    // Rotary position encoding (Su et al., arXiv 2104.09864) in the half-split form of Llama, and the cache's new rows.
    void rotate_and_cache(int layer, int64_t t) {
        const int64_t dim = shape_.head_dim, half = dim / 2, position = step_->positions[t];
        const float* cosine = &model_.cosine[position * half];
        const float* sine = &model_.sine[position * half];
        float* row = qkv_.get() + t * shape_.qkv_width();
        for (int64_t head = 0; head < shape_.heads + shape_.kv_heads; ++head) {
            float* x = row + head * dim;
            int64_t d = 0;
            for (; d + kVec <= half; d += kVec) {
                const Vec low = load16(x + d), high = load16(x + half + d), c = load16(cosine + d), s = load16(sine + d);
                store16(x + d, multiply_subtract(low, c, high * s));
                store16(x + half + d, multiply_add(high, c, low * s));
            }
            for (; d < half; ++d) {
                const float low = x[d], high = x[d + half];
                x[d] = low * cosine[d] - high * sine[d];
                x[d + half] = high * cosine[d] + low * sine[d];
            }
        }
        T* query = query_.get() + t * shape_.d_out(kQ);
        for (int64_t d = 0; d < shape_.d_out(kQ); d += kVec) store16(query + d, load16(row + d));
        const int64_t size = shape_.block_size, offset = position % size;
        const int64_t block = blocks_of(sequence_of_[t])[position / size];
        for (int head = 0; head < shape_.kv_heads; ++head) {
            cache_.store_key(row + shape_.column(kK) + head * dim, dim, size, offset, cache_.keys(layer, block, head));
            cache_.store_value(row + shape_.column(kV) + head * dim, dim, offset, cache_.values(layer, block, head));
        }
    }

    void attend(Own& own, int layer, const AttentionTask& task) {
        const MixedTiles tiles(int64_t{task.num_tokens} * task.num_heads);
        const T* queries[kQueryRows<T>];
        Left<T>* out[kQueryRows<T>];
        int32_t positions[kQueryRows<T>];
        int count = 0;
        for (int32_t t = task.first_token; t < task.first_token + task.num_tokens; ++t)
            for (int32_t h = task.first_head; h < task.first_head + task.num_heads; ++h) {
                queries[count] = query_.get() + t * shape_.d_out(kQ) + int64_t{h} * shape_.head_dim;
                out[count] = attended_.get() + t * depth(kO) + int64_t{h} * shape_.head_dim;
                positions[count++] = step_->positions[t];
            }
        Attention<T>::run(shape_, cache_, layer, task.kv_head, blocks_of(task.sequence), queries, positions, count, out,
                          own.tile);
    }

    std::vector<AttentionTask> tasks_;

  private:
    std::vector<int32_t> sequence_of_;  // (T,)
};

}  // namespace lm
