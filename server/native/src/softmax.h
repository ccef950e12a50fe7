// From scores to weights: the part of attention between its two products.
#pragma once

#include <algorithm>

#include "model.h"
#include "tile_attention.h"

namespace lm {

// Powers of two that a weight may be above the greatest score of the chunks before, before all are made relative to it.
constexpr float kSlack = 16.0f;

// Unnormalised weights of rows [first, first + rows) of a tile for the G groups of 16 keys from `start` on. `scores` and
// `weights` are these rows', kChunk apart; a row sees the keys up to its position.
//
// Any score that the weights are relative to gives the same ones but for their common factor. So a greater one matters
// only once powers of two might overflow: then what the earlier chunks gave is rescaled.
template <class T, int G>
void softmax_groups(const Shape& shape, AttentionTile<T>& tile, const float* scores, T* weights,
                    const int32_t* positions, int first, int rows, int32_t start) {
    const float scale = shape.attention_scale * kLog2E, slack = kSlack / scale;
    const int64_t dim = shape.head_dim;
    const Vec wide_scale = all(scale);
    for (int r = first; r < first + rows; ++r, scores += kChunk, weights += kChunk) {
        Vec s[G];
        for (int g = 0; g < G; ++g) s[g] = load(scores + g * kVec);
        const int32_t last = positions[r] - start;  // the last visible key of the chunk, if >= 0
        if (last < G * kVec - 1)
            for (int g = 0; g < G; ++g) s[g] = select(lanes_below(last - g * kVec + 1), s[g], all(kMinusInf));
        Vec greatest = s[0];
        for (int g = 1; g < G; ++g) greatest = maximum(s[g], greatest);
        const bool is_first = tile.greatest[r] == kMinusInf;
        if (is_first || bits_of(is_greater(greatest, all(tile.greatest[r] + slack)))) {
            const float top = greatest_of(greatest);
            if (top == kMinusInf) {  // nothing visible yet: not a number would follow from -inf - -inf
                std::memset(static_cast<void*>(weights), 0, kChunk * sizeof(T));
                continue;
            }
            if (!is_first) {
                const Vec shrink = exp2_16(all((tile.greatest[r] - top) * scale));
                float* sum = tile.sum + r * kVec;
                store(sum, load(sum) * shrink);
                float* output = tile.output.get() + r * dim;
                for (int64_t c = 0; c < dim; c += kVec) store16(output + c, load16(output + c) * shrink);
            }
            tile.greatest[r] = top;
        }
        const Vec shift = all(tile.greatest[r] * scale);
        Vec sum = load(tile.sum + r * kVec);
        for (int g = 0; g < G; ++g) {
            const Vec weight = weight_exp2_16<T>(multiply_subtract(s[g], wide_scale, shift));
            sum = sum + weight;
            store16(weights + g * kVec, weight);
        }
        store(tile.sum + r * kVec, sum);
    }
}

template <class T>
void softmax(const Shape& shape, AttentionTile<T>& tile, const float* scores, T* weights, const int32_t* positions,
             int first, int rows, int32_t start, int groups) {
    switch (groups) {
        case 1: softmax_groups<T, 1>(shape, tile, scores, weights, positions, first, rows, start); break;
        case 2: softmax_groups<T, 2>(shape, tile, scores, weights, positions, first, rows, start); break;
        case 3: softmax_groups<T, 3>(shape, tile, scores, weights, positions, first, rows, start); break;
        default: softmax_groups<T, 4>(shape, tile, scores, weights, positions, first, rows, start); break;
    }
}

}  // namespace lm
