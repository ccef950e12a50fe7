// Runs a team whose threads fail at chosen places, over and over; prints what it finds wrong, and "done".
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "threads.h"

int main(int, char** arguments) {
    const int size = std::atoi(arguments[1]);
    constexpr int kPhases = 5;
    lm::Team team(size);
    unsigned random = 1;
    const auto draw = [&random](unsigned limit) {
        random = random * 1664525u + 1013904223u;
        return (random >> 8) % limit;
    };
    for (int run = 0; run < 3000; ++run) {
        // Place p: before meeting p of the task, kPhases: behind the last. Up to two threads fail, or none.
        const int num_failing = static_cast<int>(draw(3));
        int failing[2], place[2];
        for (int i = 0; i < num_failing; ++i) {
            failing[i] = static_cast<int>(draw(size));
            place[i] = static_cast<int>(draw(kPhases + 1));
        }
        std::atomic<int> reached[kPhases + 1] = {};
        bool has_thrown = false;
        try {
            team.run([&](int id) {
                for (int phase = 0; phase <= kPhases; ++phase) {
                    reached[phase].fetch_add(1);
                    for (int i = 0; i < num_failing; ++i)
                        if (failing[i] == id && place[i] == phase) throw std::runtime_error("as asked");
                    if (phase < kPhases) team.barrier();
                }
            });
        } catch (const std::runtime_error&) {
            has_thrown = true;
        }
        if (has_thrown != (num_failing > 0)) std::printf("run %d: thrown %d\n", run, has_thrown);
        int first = kPhases + 1;
        for (int i = 0; i < num_failing; ++i) first = place[i] < first ? place[i] : first;
        for (int phase = 0; phase <= kPhases; ++phase) {
            const int expected = phase <= first ? size : 0;  // nobody goes on behind the meeting that a thread failed before
            if (reached[phase] != expected)
                std::printf("run %d: %d at %d, not %d\n", run, reached[phase].load(), phase, expected);
        }
    }
    std::printf("done\n");
}
