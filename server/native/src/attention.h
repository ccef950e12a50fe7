// Causal attention of packed tokens over the block cache, the same arithmetic for one query as for a long prompt.
//
// Keys come in chunks that start at multiples of kChunk from the beginning of the sequence; running maximum, sum and
// output are rescaled from chunk to chunk (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). Where a
// prompt is cut, or how many queries are computed together, changes no sum.
#pragma once

#include <vector>

#include "model.h"
#include "tile_attention.h"

namespace lm {

template <class T>
class Attention {
  public:
    // query (rows of `q_stride` values): row r belongs to position `positions[r]` of the sequence with `blocks`.
    static void run(const Shape& shape, const Cache<T>& cache, int layer, int kv_head, const int32_t* blocks,
                    const T* const* queries, const int32_t* positions, int rows, T* const* out, AttentionTile<T>& tile) {
        constexpr int KP = Lane<T>::KP;
        const int size = shape.block_size, dim = shape.head_dim;
        const int64_t wide = dim;  // a multiple of 16
        const bool is_tiled = kHasTiles<T> && dim % (2 * kTile) == 0;
        tile.output.resize(kQueryRows<T> * wide);
        std::fill_n(tile.output.get(), rows * wide, 0.0f);
        if (is_tiled) {
            tile.queries.resize(kQueryRows<T> * wide);
            for (int r = 0; r < rows; ++r)
                std::memcpy(static_cast<void*>(tile.queries.get() + r * wide), queries[r], wide * sizeof(T));
        }
        int32_t last = 0;
        for (int r = 0; r < rows; ++r) {
            tile.greatest[r] = kMinusInf;
            _mm512_store_ps(tile.sum + r * kVec, _mm512_setzero_ps());
            last = std::max(last, positions[r]);
        }
        for (int32_t start = 0; start <= last; start += kChunk) {
            const int keys = static_cast<int>(std::min<int64_t>(kChunk, round_up(last + 1 - start, kVec)));
            const char* lanes[kChunk / kVec];
            for (int group = 0; group < keys; group += kVec) {
                const int32_t key = start + group;
                lanes[group / kVec] = reinterpret_cast<const char*>(
                    cache.keys(layer, blocks[key / size], kv_head) + key % size * KP);
            }
            if constexpr (kHasTiles<T>)
                if (is_tiled) score_tiles(tile, rows, dim, lanes, keys, int64_t{size} * 4);
            if (!is_tiled) {
                switch (keys / kVec) {
                    case 1: score_rows<1>(queries, rows, lanes, int64_t{size} * 4, dim / KP, tile.scores); break;
                    case 2: score_rows<2>(queries, rows, lanes, int64_t{size} * 4, dim / KP, tile.scores); break;
                    case 3: score_rows<3>(queries, rows, lanes, int64_t{size} * 4, dim / KP, tile.scores); break;
                    default: score_rows<4>(queries, rows, lanes, int64_t{size} * 4, dim / KP, tile.scores); break;
                }
            }
            softmax(shape, tile, positions, rows, start, keys, wide);
            if constexpr (kHasTiles<T>)
                if (is_tiled) {
                    const T* values[kChunk / kVec];
                    for (int group = 0; group < keys; group += kVec) {
                        const int32_t key = start + group;
                        values[group / kVec] =
                            cache.values(layer, blocks[key / size], kv_head) + int64_t{key % size} * dim;
                    }
                    mix_tiles(tile, rows, dim, values, keys);
                }
            if (!is_tiled) {
                for (int64_t column = 0; column < wide; column += 2 * kVec)
                    mix_values(cache, layer, kv_head, blocks, size, dim, start, keys, rows, column, wide, tile);
            }
        }
        for (int r = 0; r < rows; ++r) {
            const __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(tile.sum + r * kVec)));
            for (int64_t c = 0; c < wide; c += kVec)
                store16(out[r] + c, _mm512_mul_ps(_mm512_loadu_ps(tile.output.get() + r * wide + c), scale));
        }
    }

  private:
    // Scores of `rows` queries against G groups of 16 keys.
    template <int G>
    static void score_rows(const T* const* queries, int rows, const char* const* keys, int64_t step_bytes, int steps,
                           float* scores) {
        int r = 0;
        for (; r + 4 <= rows; r += 4) score<4, G>(queries + r, keys, step_bytes, steps, scores + r * kChunk);
        switch (rows - r) {
            case 3: score<3, G>(queries + r, keys, step_bytes, steps, scores + r * kChunk); break;
            case 2: score<2, G>(queries + r, keys, step_bytes, steps, scores + r * kChunk); break;
            case 1: score<1, G>(queries + r, keys, step_bytes, steps, scores + r * kChunk); break;
            default: break;
        }
    }

    template <int R, int G>
    static void score(const T* const* queries, const char* const* keys, int64_t step_bytes, int steps, float* scores) {
        __m512 sums[R][G];
        for (int r = 0; r < R; ++r)
            for (int g = 0; g < G; ++g) sums[r][g] = _mm512_setzero_ps();
        for (int k = 0; k < steps; ++k) {
            __m512i w[G];
            for (int g = 0; g < G; ++g) w[g] = _mm512_loadu_si512(keys[g] + k * step_bytes);
            for (int r = 0; r < R; ++r)
                for (int g = 0; g < G; ++g)
                    sums[r][g] =
                        Lane<T>::multiply_add(sums[r][g], reinterpret_cast<const char*>(queries[r]) + k * 4, w[g]);
        }
        for (int r = 0; r < R; ++r)
            for (int g = 0; g < G; ++g) _mm512_store_ps(scores + r * kChunk + g * kVec, sums[r][g]);
    }

    // Scores of one chunk to unnormalised weights, with powers of two; rescales what the earlier chunks gave.
    static void softmax(const Shape& shape, AttentionTile<T>& tile, const int32_t* positions, int rows, int32_t start,
                        int keys, int64_t wide) {
        const __m512 scale = _mm512_set1_ps(shape.attention_scale * kLog2E);
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int r = 0; r < rows; ++r) {
            float* scores = tile.scores + r * kChunk;
            __m512 greatest = _mm512_set1_ps(tile.greatest[r]);
            const int32_t last = positions[r] - start;  // the last visible key of the chunk, if >= 0
            for (int key = 0; key < keys; key += kVec) {
                __m512 s = _mm512_mul_ps(_mm512_load_ps(scores + key), scale);
                if (last < key + kVec - 1) {
                    const __mmask16 visible = _mm512_cmple_epi32_mask(lane, _mm512_set1_epi32(last - key));
                    s = _mm512_mask_mov_ps(_mm512_set1_ps(kMinusInf), visible, s);
                }
                _mm512_store_ps(scores + key, s);
                greatest = _mm512_max_ps(s, greatest);
            }
            const float top = _mm512_reduce_max_ps(greatest);
            T* weights = tile.weights + r * kChunk;
            if (top == kMinusInf) {  // nothing visible yet: not a number would follow from -inf - -inf
                std::memset(static_cast<void*>(weights), 0, kChunk * sizeof(T));
                continue;
            }
            __m512 sum = _mm512_load_ps(tile.sum + r * kVec);
            if (top > tile.greatest[r]) {
                const __m512 shrink = exp2_16(_mm512_set1_ps(tile.greatest[r] - top));  // 0 the first time
                sum = _mm512_mul_ps(sum, shrink);
                for (int64_t c = 0; c < wide; c += kVec) {
                    float* o = tile.output.get() + r * wide + c;
                    _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_loadu_ps(o), shrink));
                }
                tile.greatest[r] = top;
            }
            const __m512 shift = _mm512_set1_ps(top);
            for (int key = 0; key < keys; key += kVec) {
                const __m512 weight = exp2_16(_mm512_sub_ps(_mm512_load_ps(scores + key), shift));
                sum = _mm512_add_ps(sum, weight);
                store16(weights + key, weight);
            }
            _mm512_store_ps(tile.sum + r * kVec, sum);
        }
    }

    // output += weights times values, for 32 columns.
    static void mix_values(const Cache<T>& cache, int layer, int kv_head, const int32_t* blocks, int size, int dim,
                           int32_t start, int keys, int rows, int64_t column, int64_t wide, AttentionTile<T>& tile) {
        int r = 0;
        for (; r + 6 <= rows; r += 6)
            mix<6>(cache, layer, kv_head, blocks, size, dim, start, keys, r, column, wide, tile);
        for (; r + 3 <= rows; r += 3)
            mix<3>(cache, layer, kv_head, blocks, size, dim, start, keys, r, column, wide, tile);
        for (; r < rows; ++r) mix<1>(cache, layer, kv_head, blocks, size, dim, start, keys, r, column, wide, tile);
    }

    template <int R>
    static void mix(const Cache<T>& cache, int layer, int kv_head, const int32_t* blocks, int size, int dim,
                    int32_t start, int keys, int first, int64_t column, int64_t wide, AttentionTile<T>& tile) {
        constexpr int KP = Lane<T>::KP;
        const bool has_second = column + kVec < wide;
        const int64_t second = has_second ? kVec : 0;
        __m512 sums[R][2];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 2; ++v) sums[r][v] = _mm512_loadu_ps(tile.output.get() + (first + r) * wide + column + v * second);
        for (int group = 0; group < keys; group += kVec) {
            const int32_t key = start + group;
            const T* lanes = cache.values(layer, blocks[key / size], kv_head) + (int64_t{key % size} * dim + column * KP);
            for (int k = 0; k < kVec / KP; ++k) {
                const __m512i w0 = _mm512_loadu_si512(lanes + int64_t{k} * dim * KP);
                const __m512i w1 = _mm512_loadu_si512(lanes + (int64_t{k} * dim + second) * KP);
                for (int r = 0; r < R; ++r) {
                    const void* left = tile.weights + (first + r) * kChunk + group + k * KP;
                    sums[r][0] = Lane<T>::multiply_add(sums[r][0], left, w0);
                    sums[r][1] = Lane<T>::multiply_add(sums[r][1], left, w1);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = has_second ? 1 : 0; v >= 0; --v)
                _mm512_storeu_ps(tile.output.get() + (first + r) * wide + column + v * second, sums[r][v]);
    }
};

}  // namespace lm
