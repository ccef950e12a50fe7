// Causal attention of packed tokens over the block cache, the same arithmetic for one query as for a long prompt.
//
// Keys come in chunks that start at multiples of kChunk from the beginning of the sequence; running maximum, sum and
// output are rescaled from chunk to chunk (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). Where a
// prompt is cut, or how many queries are computed together, changes no sum.
#pragma once

#include <algorithm>

#include "softmax.h"

namespace lm {

template <class T>
class Attention {
  public:
    // Row r of `queries` (rows, head_dim) belongs to position `positions[r]` of the sequence with `blocks`.
    static void run(const Shape& shape, const Cache<T>& cache, int layer, int kv_head, const int32_t* blocks,
                    const T* const* queries, const int32_t* positions, int rows, Left<T>* const* out,
                    AttentionTile<T>& tile) {
        const int64_t dim = shape.head_dim;  // a multiple of 16
        const bool is_tiled = kHasTiles<T> && dim % (2 * kTile) == 0;
        tile.output.resize(kQueryRows<T> * dim);
        std::fill_n(tile.output.get(), rows * dim, 0.0f);
        if (is_tiled) {
            tile.queries.resize(kQueryRows<T> * dim);
            for (int r = 0; r < rows; ++r)
                std::memcpy(static_cast<void*>(tile.queries.get() + r * dim), queries[r], dim * sizeof(T));
        }
        for (int r = 0; r < rows; ++r) {
            tile.greatest[r] = kMinusInf;
            store(tile.sum + r * kVec, zeros());
        }
        const Keys keys{shape, cache, layer, kv_head, blocks, *std::max_element(positions, positions + rows) + 1};
        if (is_tiled)
            run_tiles(keys, positions, rows, tile);
        else
            run_vectors(keys, queries, positions, rows, tile);
        for (int r = 0; r < rows; ++r) {
            const Vec scale = all(1.0f / sum_of(load(tile.sum + r * kVec)));
            const float* output = tile.output.get() + r * dim;
            for (int64_t c = 0; c < dim; c += kVec) store_left<T>(out[r] + c, load16(output + c) * scale);
        }
    }

  private:
    // Where the keys and values of one chunk lie, by groups of 16; none behind the last chunk.
    struct Chunk {
        const T* keys[kChunk / kVec];
        const T* values[kChunk / kVec];
        int groups;
    };

    // What the queries of one K/V head look at.
    struct Keys {
        const Shape& shape;
        const Cache<T>& cache;
        int layer, kv_head;
        const int32_t* blocks;
        int32_t count;

        int64_t step_bytes() const { return int64_t{shape.block_size} * 4; }  // between lanes of 16 keys

        Chunk chunk(int32_t start) const {
            const int32_t size = shape.block_size;
            Chunk found;
            found.groups = std::clamp((count - start + kVec - 1) / kVec, 0, kChunk / kVec);
            for (int group = 0; group < found.groups; ++group) {
                const int32_t key = start + group * kVec, offset = key % size;
                const int64_t block = blocks[key / size];
                found.keys[group] = cache.keys(layer, block, kv_head) + offset * Lane<T>::KP;
                found.values[group] = cache.values(layer, block, kv_head) + int64_t{offset} * shape.head_dim;
            }
            return found;
        }
    };

    static void run_vectors(const Keys& keys, const T* const* queries, const int32_t* positions, int rows,
                            AttentionTile<T>& tile) {
        const int64_t dim = keys.shape.head_dim, step_bytes = keys.step_bytes();
        const int steps = static_cast<int>(dim / Lane<T>::KP);
        for (int32_t start = 0; start < keys.count; start += kChunk) {
            const Chunk chunk = keys.chunk(start);
            for (int group = 0; group < chunk.groups; group += kScoreGroups) {
                const T* const* groups = chunk.keys + group;
                float* scores = tile.scores + group * kVec;
                switch (std::min(kScoreGroups, chunk.groups - group)) {
                    case 1: score_rows<1>(queries, rows, groups, step_bytes, steps, scores); break;
                    case 2: score_rows<2>(queries, rows, groups, step_bytes, steps, scores); break;
                    case 3: score_rows<3>(queries, rows, groups, step_bytes, steps, scores); break;
                    default: score_rows<4>(queries, rows, groups, step_bytes, steps, scores); break;
                }
            }
            softmax(keys.shape, tile, tile.scores, tile.weights, positions, 0, rows, start, chunk.groups);
            for (int64_t column = 0; column < dim; column += kMixColumns * kVec)
                mix_values(chunk, dim, rows, column, tile);
        }
    }

    // Tile by tile of rows. The matrix unit has no part in the weights of one tile: meanwhile it scores the next one and
    // mixes the one before, whose scores and weights are the other half of the buffers.
    static void run_tiles(const Keys& keys, const int32_t* positions, int rows, AttentionTile<T>& tile) {
        if constexpr (kHasTiles<T>) {
            const int dim = keys.shape.head_dim;
            const auto score = [&](const Chunk& chunk, int row, int half) {
                score_tile(tile.queries.get() + row * dim, tile.scores + half * kTile * kChunk, dim, chunk.keys,
                           chunk.groups, keys.step_bytes());
            };
            const auto mix = [&](const Chunk& chunk, int row, int half) {
                mix_tile(tile.weights + half * kTile * kChunk, tile.output.get() + row * dim, dim, chunk.values,
                         chunk.groups);
            };
            const int last_row = (rows - 1) / kTile * kTile;
            Chunk before{}, now = keys.chunk(0), next = keys.chunk(kChunk);
            int half = 0;
            score(now, 0, half);
            for (int32_t start = 0; start < keys.count; start += kChunk) {
                const Chunk after = keys.chunk(start + 2 * kChunk);
                for (int row = 0; row < rows; row += kTile, half = 1 - half) {
                    fetch(keys, after, next, row, rows);
                    if (row < last_row)
                        score(now, row + kTile, 1 - half);
                    else if (next.groups > 0)
                        score(next, 0, 1 - half);
                    if (row > 0)
                        mix(now, row - kTile, 1 - half);
                    else if (start > 0)
                        mix(before, last_row, 1 - half);
                    softmax(keys.shape, tile, tile.scores + half * kTile * kChunk,
                            tile.weights + half * kTile * kChunk, positions, row, std::min(kTile, rows - row), start,
                            now.groups);
                }
                before = now;
                now = next;
                next = after;
            }
            mix(before, last_row, 1 - half);
        }
    }

    // Ask for a part of these keys and values, with each tile of rows another one: a prompt's do not fit into the
    // first-level cache, and blocks lie too far apart for the CPU to see what comes next.
    static void fetch(const Keys& all, const Chunk& keys, const Chunk& values, int row, int rows) {
        const int lines = all.shape.head_dim / Lane<T>::KP, tiles = (rows + kTile - 1) / kTile;
        const int piece = (lines + tiles - 1) / tiles, from = row / kTile * piece, stop = std::min(lines, from + piece);
        for (int group = 0; group < keys.groups; ++group)
            for (int line = from; line < stop; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(keys.keys[group]) + line * all.step_bytes(), _MM_HINT_T0);
        for (int group = 0; group < values.groups; ++group)
            for (int line = from; line < stop; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(values.values[group]) + line * kCacheLine, _MM_HINT_T0);
    }

    // What registers keep the sums of: scores of so many queries and groups of 16 keys; rows of an output, and vectors.
    static constexpr int kScoreRows = 4, kScoreGroups = kHasManyRegisters ? 4 : 1;
    static constexpr int kMixRows = kHasManyRegisters ? 6 : 4, kMixColumns = kHasManyRegisters ? 2 : 1;

    // Scores of `rows` queries against G groups of 16 keys.
    template <int G>
    static void score_rows(const T* const* queries, int rows, const T* const* keys, int64_t step_bytes, int steps,
                           float* scores) {
        int r = 0;
        for (; r + kScoreRows <= rows; r += kScoreRows)
            score<kScoreRows, G>(queries + r, keys, step_bytes, steps, scores + r * kChunk);
        switch (rows - r) {
            case 3: score<3, G>(queries + r, keys, step_bytes, steps, scores + r * kChunk); break;
            case 2: score<2, G>(queries + r, keys, step_bytes, steps, scores + r * kChunk); break;
            case 1: score<1, G>(queries + r, keys, step_bytes, steps, scores + r * kChunk); break;
            default: break;
        }
    }

    template <int R, int G>
    static void score(const T* const* queries, const T* const* keys, int64_t step_bytes, int steps, float* scores) {
        Vec sums[R][G];
        for (int r = 0; r < R; ++r)
            for (int g = 0; g < G; ++g) sums[r][g] = zeros();
        for (int k = 0; k < steps; ++k) {
            IntVec w[G];
            for (int g = 0; g < G; ++g)
                w[g] = load_lanes(reinterpret_cast<const char*>(keys[g]) + k * step_bytes);
            for (int r = 0; r < R; ++r)
                for (int g = 0; g < G; ++g)
                    sums[r][g] =
                        Lane<T>::multiply_add(sums[r][g], reinterpret_cast<const char*>(queries[r]) + k * 4, w[g]);
        }
        for (int r = 0; r < R; ++r)
            for (int g = 0; g < G; ++g) store(scores + r * kChunk + g * kVec, sums[r][g]);
    }

    // output += weights times values, for kMixColumns vectors of columns.
    static void mix_values(const Chunk& chunk, int64_t dim, int rows, int64_t column, AttentionTile<T>& tile) {
        int r = 0;
        for (; r + kMixRows <= rows; r += kMixRows) mix<kMixRows>(chunk, dim, r, column, tile);
        for (; r + 3 <= rows; r += 3) mix<3>(chunk, dim, r, column, tile);
        for (; r < rows; ++r) mix<1>(chunk, dim, r, column, tile);
    }

    template <int R>
    static void mix(const Chunk& chunk, int64_t dim, int first, int64_t column, AttentionTile<T>& tile) {
        constexpr int KP = Lane<T>::KP, V = kMixColumns;
        int64_t places[V];  // of the vectors; the last one twice where there are no more
        for (int v = 0; v < V; ++v) places[v] = std::min<int64_t>(v * kVec, dim - column - kVec);
        float* output = tile.output.get() + first * dim + column;
        Vec sums[R][V];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v] = load(output + r * dim + places[v]);
        for (int group = 0; group < chunk.groups; ++group) {
            const T* lanes = chunk.values[group] + column * KP;
            for (int k = 0; k < kVec / KP; ++k) {
                IntVec w[V];
                for (int v = 0; v < V; ++v) w[v] = load_lanes(lanes + (int64_t{k} * dim + places[v]) * KP);
                for (int r = 0; r < R; ++r) {
                    const void* left = tile.weights + (first + r) * kChunk + group * kVec + k * KP;
                    for (int v = 0; v < V; ++v) sums[r][v] = Lane<T>::multiply_add(sums[r][v], left, w[v]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) store(output + r * dim + places[v], sums[r][v]);
    }
};

}  // namespace lm
