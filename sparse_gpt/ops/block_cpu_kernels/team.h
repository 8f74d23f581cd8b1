// Threads that live as long as one call: nothing to keep over a fork, nothing to wait for at exit.
//
// A few tens of microseconds a call, against milliseconds of work; small work runs in the caller.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

class Team {
public:
    // Run body(team, thread) in every thread, the caller being thread 0.
    template <typename Body>
    static void run(int threads, Body body) {
        Team team;
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < threads; ++i)
                others.emplace_back([&team, &body, i] {
                    if (team.started()) body(team, i);
                });
        } catch (const std::exception&) {
            // Fewer threads do the same work; results do not depend on their number.
        }
        team.start(static_cast<int>(others.size()) + 1);
        body(team, 0);
        for (std::thread& other : others) other.join();
    }

    // Each of `count` items in one of the threads; all threads call it, and leave it together.
    template <typename Item>
    void each(int64_t count, Item item) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) item(i);
        wait();
    }

private:
    void start(int size) {
        size_ = size;
        go_.store(true, std::memory_order_release);
    }

    bool started() const {
        while (!go_.load(std::memory_order_acquire)) std::this_thread::yield();
        return true;
    }

    void wait() {
        const int64_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
            if (spins > 1000) std::this_thread::yield();
    }

    int size_ = 1;
    std::atomic<bool> go_{false};
    std::atomic<int> arrived_{0};
    std::atomic<int64_t> next_{0}, round_{0};
};
