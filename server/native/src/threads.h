// A team of threads that runs one function at a time together, with a barrier between its phases.
//
// Threads meet hundreds of times in a decoding step of a few milliseconds, so they first wait by spinning; a thread that
// waits longer sleeps, and leaves its core to whoever the others wait for. Knows nothing of what it runs.
//
// What one thread throws ends the task of all: it meets the others at their next barrier, which throws for them, and the
// caller of `run` gets it once nobody is in the task any more.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace lm {

// A counter that threads can wait for.
class alignas(64) Signal {
  public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    void raise() {
        value_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0)
            syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }

    // Returns once the value is no longer `seen`.
    void wait(uint32_t seen) {
        for (int i = 0; i < kSpins; ++i) {
            if (value() != seen) return;
            _mm_pause();
        }
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while (value_.load(std::memory_order_seq_cst) == seen)
            syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }

  private:
    static constexpr int kSpins = 4096;  // about 50 us
    static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "the kernel compares the plain word");
    std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> sleepers_{0};
};

class Team {
  public:
    // Throws std::system_error where the system gives no more threads.
    explicit Team(int size) : size_(size) {
        try {
            for (int id = 1; id < size; ++id) workers_.emplace_back([this, id] { serve(id); });
        } catch (...) {
            close();
            throw;
        }
    }

    ~Team() { close(); }

    int size() const { return size_; }

    // Run `task(id)` on every thread, the caller being thread 0; returns when all have, or throws what one has thrown.
    void run(const std::function<void(int)>& task) {
        task_ = &task;
        failed_at_.store(kNever, std::memory_order_relaxed);
        start_.raise();
        attempt(0);
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    // All threads of a running task wait for one another.
    void barrier() {
        const int64_t phase = meet();
        if (failed_at_.load(std::memory_order_acquire) == phase) throw Abandoned();
    }

  private:
    struct Abandoned {};  // another thread has failed
    static constexpr int64_t kNever = -1;

    // Every thread meets the others twice behind the task: where they may still be in it, and once nobody is.
    void attempt(int id) {
        try {
            (*task_)(id);
            meet();
        } catch (const Abandoned&) {
        } catch (...) {
            {
                const std::lock_guard<std::mutex> lock(failing_);
                if (!failure_) failure_ = std::current_exception();
            }
            // Only those throw that meet this thread next; one may not have left the barrier before yet.
            failed_at_.store(phase_.value(), std::memory_order_release);
            meet();
        }
        meet();
    }

    // The number of the meeting.
    int64_t meet() {
        const uint32_t phase = phase_.value();
        if (size_ == 1) return phase;
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.raise();
        } else {
            phase_.wait(phase);
        }
        return phase;
    }

    void close() {
        is_closing_ = true;
        start_.raise();
        for (auto& worker : workers_) worker.join();
    }

    void serve(int id) {
        for (uint32_t seen = 0;; ++seen) {
            start_.wait(seen);
            if (is_closing_) return;
            attempt(id);
        }
    }

    const int size_;
    const std::function<void(int)>* task_ = nullptr;
    std::mutex failing_;
    std::exception_ptr failure_;  // the first one
    std::atomic<int64_t> failed_at_{kNever};  // the number of the meeting that the failed thread comes to
    bool is_closing_ = false;
    Signal start_, phase_;
    alignas(64) std::atomic<int> arrived_{0};
    std::vector<std::thread> workers_;  // last: they use the rest
};

}  // namespace lm
