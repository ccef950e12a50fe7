// State of a step that all phases share, and how threads divide a phase among them.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "attention.h"
#include "shortlist.h"
#include "threads.h"
#include "tiles.h"

namespace lm {

// One adapter's part in one projection of a step: its tokens, their gates, and where their rows of rank space begin.
template <class T>
struct Update {
    const LoraPair<T>* pair;
    const int32_t* tokens;
    const float* weights;
    int32_t count;
    int64_t hidden;
};

// Tokens whose way into rank space, and out of it, is computed together.
template <class T>
constexpr int kUnitRows = kHasTiles<T> ? 4 * kTile : kTileRows;
template <class T>
constexpr int kUpdateRows = kHasTiles<T> ? kTile : kTileRows;

// Up to kUnitRows tokens of an update, from `entry` on.
struct Unit {
    int32_t projection, update, entry;
};

// What one thread needs for itself.
template <class T>
struct Scratch {
    Grouping groupings[3];
    std::vector<Update<T>> updates[3];  // by projection of the group at work
    std::vector<Unit> units;
    int64_t hidden_size = 0;            // values of rank space in this phase
    int64_t most_rows = 0;              // tokens of its largest update
    Buffer<float> columns;    // results of the panels at work
    Buffer<float> narrow;     // (kUnitRows, 64): a few panels of an adapter
    Buffer<Left<T>> gathered; // (kUnitRows, padded d_in)
    const int32_t* gathered_tokens = nullptr;  // whose rows `gathered` holds
    AttentionTile<T> tile;
    ShortlistScratch shortlist;
    std::vector<float> greatest;      // (num_logits,) over the columns this thread computed
    std::vector<int32_t> greatest_id;
    unsigned phase = 0;
};

template <class T>
class Stage {
  public:
    Stage(const Model<T>& model, const Cache<T>& cache, Team& team)
        : model_(model), shape_(model.shape), cache_(cache), team_(team), scratch_(team.size()),
          counters_(model.shape.layers * kPhases + kPhases) {
        for (auto& own : scratch_) {
            own.narrow.resize(kUnitRows<T> * 4 * kVec);
            own.gathered.resize(kUnitRows<T> * std::max(depth(kQ), std::max(depth(kO), depth(kDown))));
            own.columns.resize(kRowsAtOnce * kPanelsAtOnce * kPanel);
        }
    }

  protected:
    static constexpr int kPhases = 24;              // at most, of one layer
    static constexpr int64_t kRowsAtOnce = 256;     // rows whose results of a piece stay in the caches
    static constexpr int64_t kRowUnit = 32;         // kRowsAtOnce is a multiple
    static constexpr int64_t kPanelsAtOnce = 4;     // panels in the largest piece

    void begin(const Step& step) {
        step_ = &step;
        const int64_t tokens = step.num_tokens;
        residual_.resize(tokens * shape_.hidden);
        const int64_t padded = round_up(tokens, kRowUnit) + kTile;  // the matrix unit reads whole tiles
        normed_.resize(std::max(padded, round_up(step.num_logits, kRowUnit)) * depth(kQ));
        qkv_.resize(padded * shape_.qkv_width());
        query_.resize(tokens * shape_.d_out(kQ));
        attended_.resize(padded * depth(kO));
        activated_.resize(padded * depth(kDown));
        if (shape_.is_int8) {
            const int64_t deepest = std::max(depth(kQ), std::max(depth(kO), depth(kDown)));
            int8_rows_.resize(std::max<int64_t>(tokens, step.num_logits), deepest);
        }
        for (auto& counter : counters_) counter.store(0, std::memory_order_relaxed);
        for (auto& own : scratch_) {
            own.phase = 0;
            own.greatest.assign(step.num_logits, kMinusInf);
            own.greatest_id.assign(step.num_logits, 0);
        }
    }

    // Every thread takes [first, first + count) pieces of `total` until none is left; then all meet.
    template <class Body>
    void take(Scratch<T>& own, int64_t total, int64_t piece, Body body) {
        std::atomic<int32_t>& counter = counters_[own.phase++];
        for (;;) {
            const int64_t first = counter.fetch_add(static_cast<int32_t>(piece), std::memory_order_relaxed);
            if (first >= total) break;
            body(first, std::min(piece, total - first));
        }
        team_.barrier();
    }

    // Pieces of rows, `smallest` at least: small enough that threads end together.
    template <class Body>
    void row_pieces(Scratch<T>& own, int64_t total, int64_t smallest, Body body) {
        take(own, total, std::max<int64_t>(smallest, total / (team_.size() * 4)), body);
    }

    template <class Body>
    void rows(Scratch<T>& own, int64_t total, Body body) {
        row_pieces(own, total, 1, [&](int64_t first, int64_t count) {
            for (int64_t t = first; t < first + count; ++t) body(t);
        });
    }

    template <class Body>
    void panels(Scratch<T>& own, const Linear<T>& weight, Body body) {
        // Two panels at a time keep the memory streams long; one at a time shares a small matrix evenly.
        const int64_t total = weight.num_panels();
        const int64_t piece = total >= 32 * team_.size() ? kPanelsAtOnce : total >= 24 * team_.size() ? 2 : 1;
        take(own, total, piece, body);
    }

    // Ask for places that are about to be written, `columns` values from `out` on in rows `stride` values apart: another
    // thread may have used them last, and getting a line from it takes longer than the work on it.
    template <class V>
    static void claim(const V* out, int64_t stride, int64_t rows, int64_t columns) {
        constexpr int64_t kValues = kCacheLine / sizeof(V);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; c += kValues) __builtin_prefetch(out + r * stride + c, 1);
    }

    int64_t depth(int projection) const { return round_up(shape_.d_in(projection), kDepthUnit); }
    Left<T>* normed_row(int64_t row) { return normed_.get() + row * depth(kQ); }

    // RMSNorm in float32, rounded once: the input of the next projections.
    void norm(const float* x, const std::vector<float>& weight, Left<T>* out) const {
        Vec squares = zeros();
        const int64_t n = shape_.hidden;
        int64_t k = 0;
        for (; k + kVec <= n; k += kVec) squares = multiply_add(load16(x + k), load16(x + k), squares);
        float total = sum_of(squares);
        for (int64_t j = k; j < n; ++j) total += x[j] * x[j];
        const float scale = 1.0f / std::sqrt(total / static_cast<float>(n) + shape_.norm_eps);
        for (k = 0; k + kVec <= n; k += kVec)
            store_left<T>(out + k, load16(x + k) * all(scale) * load16(&weight[k]));
        for (; k < n; ++k) store_left<T>(out + k, x[k] * scale * weight[k]);
    }

    // What the routers of a layer read, for calibration.
    void copy_input(int layer, int64_t t) const {
        float* out = step_->inputs + (int64_t{layer} * step_->num_tokens + t) * shape_.hidden;
        const Left<T>* x = normed_.get() + t * depth(kQ);
        for (int64_t k = 0; k < shape_.hidden; ++k) out[k] = to_float(x[k]);
    }

    const Model<T>& model_;
    const Shape& shape_;
    Cache<T> cache_;
    Team& team_;
    const Step* step_ = nullptr;
    std::vector<Scratch<T>> scratch_;
    std::vector<std::atomic<int32_t>> counters_;
    Buffer<float> residual_;  // (T, hidden)
    Buffer<float> qkv_;       // (padded T, qkv_width): whole tiles are written
    Buffer<T> query_;         // (T, heads * head_dim), rotated
    Buffer<Left<T>> normed_;     // (T, padded hidden): input of q, k, v or of gate and up
    Buffer<Left<T>> attended_;   // (T, padded heads * head_dim): input of o
    Buffer<Left<T>> activated_;  // (T, padded intermediate): input of down
    Int8Rows int8_rows_;         // the input of the product at work, for int8 weights
};

}  // namespace lm
