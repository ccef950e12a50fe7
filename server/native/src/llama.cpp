// C interface of the native step, called through ctypes. Every function is for one dtype, chosen when the engine is
// made: 0 float32, 1 bfloat16. Functions return null or an error text that lives until the next call of the thread.
#include <exception>
#include <string>

#include "forward.h"

namespace lm {

class Engine {
  public:
    virtual ~Engine() = default;
    virtual void set_linear(int layer, int which, const void* weight, const void* scales, const float* bias) = 0;
    virtual void set_norm(int layer, int which, const float* weight) = 0;
    virtual void set_head(const void* head, const void* scales, const void* embedding) = 0;
    virtual void set_rotary(const float* cosine, const float* sine) = 0;
    virtual void set_cache(void* data, int64_t num_blocks) = 0;
    virtual void* make_adapter(const int32_t* ranks, const float* const* a, const float* const* b) = 0;
    virtual int64_t adapter_bytes(const int32_t* ranks) const = 0;
    virtual void drop_adapter(void* adapter) = 0;
    virtual void* make_shortlist(const Router& router, const int32_t* slots, int32_t num_slots) = 0;
    virtual void drop_shortlist(void* shortlist) = 0;
    virtual void run(const Step& step) = 0;
};

template <class T>
class TypedEngine : public Engine {
  public:
    TypedEngine(const Shape& shape, int num_threads) : model_(shape), team_(num_threads) {}

    void set_linear(int layer, int which, const void* weight, const void* scales, const float* bias) override {
        const Shape& shape = model_.shape;
        Layer<T>& target = model_.layers[layer];
        const int64_t n = shape.d_out(which), k = shape.d_in(which);
        fill(target.matrix(which), shape.column(which), n, k, weight, scales);
        if (bias) target.bias[which].assign(bias, bias + n);
    }

    void set_norm(int layer, int which, const float* weight) override {
        std::vector<float>& target = layer < 0 ? model_.final_norm
                                     : which   ? model_.layers[layer].mlp_norm
                                               : model_.layers[layer].attention_norm;
        target.assign(weight, weight + model_.shape.hidden);
    }

    void set_head(const void* head, const void* scales, const void* embedding) override {
        const Shape& shape = model_.shape;
        fill(model_.head, 0, shape.vocab, shape.hidden, head, scales);
        if (!shape.is_tied)
            std::memcpy(static_cast<void*>(model_.embedding.get()), embedding,
                        int64_t{shape.vocab} * shape.hidden * sizeof(T));
    }

    void set_rotary(const float* cosine, const float* sine) override {
        model_.cosine.assign(cosine, cosine + model_.cosine.size());
        model_.sine.assign(sine, sine + model_.sine.size());
    }

    void set_cache(void* data, int64_t num_blocks) override {
        const Shape& shape = model_.shape;
        Cache<T> cache;
        cache.data = static_cast<T*>(data);
        cache.kv_heads = shape.kv_heads;
        cache.tile = int64_t{shape.block_size} * shape.head_dim;
        cache.layer_stride = num_blocks * shape.kv_heads * 2 * cache.tile;
        forward_ = std::make_unique<Forward<T>>(model_, cache, team_);
    }

    void* make_adapter(const int32_t* ranks, const float* const* a, const float* const* b) override {
        const Shape& shape = model_.shape;
        auto adapter = std::make_unique<Adapter<T>>();
        adapter->pairs.resize(int64_t{shape.layers} * kNumProjections);
        for (int64_t i = 0; i < static_cast<int64_t>(adapter->pairs.size()); ++i) {
            if (!ranks[i]) continue;
            const int projection = static_cast<int>(i % kNumProjections);
            const int64_t d_in = shape.d_in(projection), d_out = shape.d_out(projection);
            LoraPair<T>& pair = adapter->pairs[i];
            pair.allocate(ranks[i], d_in, d_out);
            pair.a.fill(0, pair.rank, a[i], d_in);
            pair.b.fill(0, d_out, b[i], pair.rank);
        }
        return adapter.release();
    }

    int64_t adapter_bytes(const int32_t* ranks) const override {
        const Shape& shape = model_.shape;
        int64_t values = 0;
        for (int64_t i = 0; i < int64_t{shape.layers} * kNumProjections; ++i) {
            const int projection = static_cast<int>(i % kNumProjections);
            if (ranks[i]) values += LoraPair<T>().measure(ranks[i], shape.d_in(projection), shape.d_out(projection));
        }
        return values * sizeof(T);
    }

    void drop_adapter(void* adapter) override { delete static_cast<Adapter<T>*>(adapter); }

    void* make_shortlist(const Router& router, const int32_t* slots, int32_t num_slots) override {
        auto shortlist = std::make_unique<ShortlistRouter<T>>();
        shortlist->num_slots = num_slots;
        shortlist->place.assign(router.num_slots, -1);
        for (int32_t p = 0; p < num_slots; ++p) shortlist->place[slots[p]] = p;
        shortlist->gates.resize(int64_t{model_.shape.layers} * kNumProjections);
        const std::vector<int32_t> chosen(slots, slots + num_slots);
        for (int gate = 0; gate < static_cast<int>(shortlist->gates.size()); ++gate)
            if (router.rows[gate])
                fill_prototypes(shortlist->gates[gate], router.rows[gate], model_.shape.d_in(gate % kNumProjections), chosen);
        return shortlist.release();
    }

    void drop_shortlist(void* shortlist) override { delete static_cast<ShortlistRouter<T>*>(shortlist); }

    void run(const Step& step) override { forward_->run(step); }

  private:
    static void fill(Linear<T>& matrix, int64_t first, int64_t n, int64_t k, const void* weight, const void* scales) {
        if (matrix.is_int8())
            matrix.fill_int8(first, n, static_cast<const int8_t*>(weight), static_cast<const Bf16*>(scales));
        else
            matrix.plain.fill(first, n, static_cast<const T*>(weight), k);
    }

    Model<T> model_;
    Team team_;
    std::unique_ptr<Forward<T>> forward_;
};

thread_local std::string last_error;

template <class Body>
const char* guarded(Body body) {
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        last_error = error.what();
        return last_error.c_str();
    }
}

}  // namespace lm

extern "C" {

#define LM_EXPORT __attribute__((visibility("default")))

// Raised whenever a struct or a signature changes, so that a stale build is noticed instead of misread.
LM_EXPORT int32_t lm_interface_version() { return 4; }

// Whether this process may use the registers this build needs. Call before the first engine is made.
LM_EXPORT int32_t lm_is_usable() { return lm::enable_tiles(); }

LM_EXPORT const char* lm_engine_new(const lm::Shape* shape, int32_t dtype, int32_t num_threads, lm::Engine** out) {
    return lm::guarded([&] {
        if (dtype == 0)
            *out = new lm::TypedEngine<float>(*shape, num_threads);
        else
            *out = new lm::TypedEngine<lm::Bf16>(*shape, num_threads);
    });
}

LM_EXPORT void lm_engine_free(lm::Engine* engine) { delete engine; }

// Weights (d_out, d_in) of the engine's dtype; in an int8 engine of bytes, with bfloat16 `scales` (d_out, groups of 32).
LM_EXPORT const char* lm_set_linear(lm::Engine* engine, int32_t layer, int32_t which, const void* weight,
                                    const void* scales, const float* bias) {
    return lm::guarded([&] { engine->set_linear(layer, which, weight, scales, bias); });
}

LM_EXPORT const char* lm_set_norm(lm::Engine* engine, int32_t layer, int32_t which, const float* weight) {
    return lm::guarded([&] { engine->set_norm(layer, which, weight); });
}

LM_EXPORT const char* lm_set_head(lm::Engine* engine, const void* head, const void* scales, const void* embedding) {
    return lm::guarded([&] { engine->set_head(head, scales, embedding); });
}

LM_EXPORT const char* lm_set_rotary(lm::Engine* engine, const float* cosine, const float* sine) {
    return lm::guarded([&] { engine->set_rotary(cosine, sine); });
}

LM_EXPORT const char* lm_set_cache(lm::Engine* engine, void* data, int64_t num_blocks) {
    return lm::guarded([&] { engine->set_cache(data, num_blocks); });
}

LM_EXPORT const char* lm_adapter_new(lm::Engine* engine, const int32_t* ranks, const float* const* a,
                                     const float* const* b, void** out) {
    return lm::guarded([&] { *out = engine->make_adapter(ranks, a, b); });
}

// Memory that an adapter of these ranks takes, in bytes: matrices are padded to whole panels.
LM_EXPORT int64_t lm_adapter_bytes(lm::Engine* engine, const int32_t* ranks) { return engine->adapter_bytes(ranks); }

LM_EXPORT void lm_adapter_free(lm::Engine* engine, void* adapter) { engine->drop_adapter(adapter); }

// Prototypes of `slots` (ascending), which have gate rows in `router`.
LM_EXPORT const char* lm_shortlist_new(lm::Engine* engine, const lm::Router* router, const int32_t* slots,
                                       int32_t num_slots, void** out) {
    return lm::guarded([&] { *out = engine->make_shortlist(*router, slots, num_slots); });
}

LM_EXPORT void lm_shortlist_free(lm::Engine* engine, void* shortlist) { engine->drop_shortlist(shortlist); }

LM_EXPORT const char* lm_run(lm::Engine* engine, const lm::Step* step) {
    return lm::guarded([&] { engine->run(*step); });
}

}  // extern "C"
