// The threads of a call: those of the OpenMP that torch computes with, where it is in the process.
//
// Threads of our own would share cores with torch's, which spin for milliseconds after each of its
// operations. Where there are none, threads live as long as one call.
#pragma once

#include <atomic>
#include <cstdint>
#include <dlfcn.h>
#include <pthread.h>
#include <system_error>
#include <thread>
#include <vector>

class Team {
public:
    // Run body(team, thread) in every thread, the caller being thread 0.
    template <typename Body>
    static void run(int threads, Body body) {
        static const OpenMP openmp;
        Team team;
        if (threads > 1 && openmp.parallel && !OpenMP::forked) {
            Call<Body> call{&team, &body, &openmp};
            openmp.parallel(Call<Body>::run, &call, static_cast<unsigned>(threads), 0);
            return;
        }
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
    // What GCC compiles a parallel region to; other OpenMPs have it, too. It may give fewer threads.
    struct OpenMP {
        void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
        int (*thread)();
        int (*threads)();

        static inline std::atomic<bool> forked{false};  // its threads did not come along

        OpenMP() {
            const void* library = find("GOMP_parallel", &parallel);
            const bool one = library && find("omp_get_thread_num", &thread) == library &&
                             find("omp_get_num_threads", &threads) == library;
            if (!one || pthread_atfork(nullptr, nullptr, [] { forked = true; })) parallel = nullptr;
        }

        // The library that a function is from, or null.
        template <typename Function>
        static const void* find(const char* name, Function* function) {
            void* found = dlsym(RTLD_DEFAULT, name);
            *function = reinterpret_cast<Function>(found);
            Dl_info info;
            return found && dladdr(found, &info) ? info.dli_fbase : nullptr;
        }
    };

    template <typename Body>
    struct Call {
        Team* team;
        Body* body;
        const OpenMP* openmp;

        static void run(void* data) {
            const Call& call = *static_cast<Call*>(data);
            const int thread = call.openmp->thread();
            if (thread == 0) call.team->start(call.openmp->threads());
            if (call.team->started()) (*call.body)(*call.team, thread);
        }
    };

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
