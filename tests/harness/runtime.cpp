// Runs kernels of raw_kernels/ on a CPU: one fiber per GPU thread, barriers and wave collectives as rendezvous.
//
// A thread runs until it reaches a barrier or a collective. Waves take turns in an order drawn from the seed, and so do
// the lanes within one: code that relies on an order that the GPU does not promise gives other results under another
// seed. LDS is filled with NaN before each block. What a GPU would hang on or leave undefined is an error: a barrier or
// a collective that some threads do not reach, a read of a lane outside the wave, an index outside an LDS array.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <xmmintrin.h>

typedef uint32_t u32;
typedef uint64_t u64;

// Saves the registers that a call keeps and the stack pointer, and goes on with those of another stack. setjmp and
// ucontext do the same at several times the price, and most of a run's time is spent here.
asm(R"(
.text
forge_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

extern "C" {
void forge_switch(void **from, void *to);
struct ForgeThread {
    u32 thread, lane;
    u32 block[3];
};
ForgeThread *forge_self;
u32 forge_wave;
}

namespace {

enum State { READY, AT_BARRIER, AT_SHUFFLE, AT_BALLOT, DONE };

struct Fiber {
    ForgeThread self; // first: forge_self points here
    State state;
    u32 site, lane; // of a collective: where it stands in the program, and the lane to read
    u64 value, result;
    u32 shares; // how often it has shared
    void *context; // its stack pointer while others run
    char *stack;
};

const size_t STACK = 256 << 10;
const u64 SHARED_BYTES = 64;
const u32 MOST = 1024;
Fiber fibers[MOST];
char shared[2][MOST][SHARED_BYTES]; // in turns: who is ahead by one leaves alone what the others still read
void *scheduler;
char message[512];
void (*kernel)(void **);
void **arguments;
u64 random_state;

u32 draw(u32 below) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)((random_state >> 33) % below);
}

Fiber &current() { return *reinterpret_cast<Fiber *>(forge_self); }

u32 next_lane;
u32 wave_order[MOST], lane_order[64];

// Leave for the next lane of the wave that can run, or for the scheduler if there is none, or after a fault.
void next(void **from) {
    while (!message[0] && next_lane < forge_wave) {
        Fiber &fiber = fibers[lane_order[next_lane++]];
        if (fiber.state != READY) continue;
        forge_self = &fiber.self;
        return forge_switch(from, fiber.context);
    }
    forge_switch(from, scheduler);
}

void pause(State state) {
    Fiber &fiber = current();
    fiber.state = state;
    next(&fiber.context);
}

void start() {
    kernel(arguments);
    pause(DONE);
}

// As if the fiber had been left just before its first instruction.
void prepare(Fiber &fiber) {
    void **top = (void **)(fiber.stack + STACK) - 2; // a function begins 8 bytes off a multiple of 16
    *top = (void *)start;
    fiber.context = top - 6;
    fiber.shares = 0;
    fiber.state = READY;
}

void order(u32 *items, u32 count, u32 first, bool shuffled) {
    for (u32 i = 0; i < count; ++i) items[i] = first + i;
    for (u32 i = count; shuffled && i > 1; --i) {
        u32 j = draw(i), t = items[i - 1];
        items[i - 1] = items[j];
        items[j] = t;
    }
}

// All lanes of a wave stand at the same collective: give each its result.
void exchange(u32 first) {
    Fiber *wave = fibers + first;
    for (u32 i = 0; i < forge_wave; ++i)
        if (wave[i].state != wave[0].state || wave[i].site != wave[0].site) {
            snprintf(message, sizeof message, "thread %u: a shuffle or ballot that not all lanes of its wave reach", first + i);
            return;
        }
    u64 bits = 0;
    for (u32 i = 0; i < forge_wave; ++i) bits |= (u64)(wave[i].value != 0) << i;
    for (u32 i = 0; i < forge_wave; ++i) {
        if (wave[i].state == AT_BALLOT) {
            wave[i].result = bits;
        } else if (wave[i].lane >= forge_wave) {
            snprintf(message, sizeof message, "thread %u: shuffle from lane %u of a wave of %u", first + i, wave[i].lane, forge_wave);
            return;
        } else {
            wave[i].result = wave[wave[i].lane].value;
        }
    }
    for (u32 i = 0; i < forge_wave; ++i) wave[i].state = READY;
}

void run_wave(u32 first, bool shuffled) {
    for (;;) {
        order(lane_order, forge_wave, first, shuffled);
        next_lane = 0;
        next(&scheduler);
        if (message[0]) return;
        u32 waiting = 0;
        for (u32 i = 0; i < forge_wave; ++i) waiting += fibers[first + i].state == AT_SHUFFLE || fibers[first + i].state == AT_BALLOT;
        if (waiting == 0) return;
        if (waiting < forge_wave) {
            snprintf(message, sizeof message, "thread %u: a shuffle or ballot that only %u of %u lanes reach", first, waiting, forge_wave);
            return;
        }
        exchange(first);
        if (message[0]) return;
    }
}

void run_block(u32 threads, bool shuffled) {
    u32 waves = threads / forge_wave;
    for (;;) {
        order(wave_order, waves, 0, shuffled);
        for (u32 i = 0; i < waves; ++i) {
            run_wave(wave_order[i] * forge_wave, shuffled);
            if (message[0]) return;
        }
        u32 done = 0;
        for (u32 i = 0; i < threads; ++i) done += fibers[i].state == DONE;
        if (done == threads) return;
        if (done) {
            snprintf(message, sizeof message, "a barrier that %u of %u threads do not reach", done, threads);
            return;
        }
        for (u32 i = 1; i < threads; ++i)
            if (fibers[i].site != fibers[0].site) {
                snprintf(message, sizeof message, "thread %u: a barrier in a branch that thread 0 does not take", i);
                return;
            }
        for (u32 i = 0; i < threads; ++i) fibers[i].state = READY;
    }
}

} // namespace

extern "C" {

__attribute__((noinline)) void forge_barrier() {
    current().site = (u32)(uintptr_t)__builtin_return_address(0);
    pause(AT_BARRIER);
}

__attribute__((noinline)) u64 forge_shuffle(u64 value, u32 lane) {
    Fiber &fiber = current();
    fiber.value = value, fiber.lane = lane, fiber.site = (u32)(uintptr_t)__builtin_return_address(0);
    pause(AT_SHUFFLE);
    return current().result;
}

__attribute__((noinline)) u64 forge_ballot(u32 predicate) {
    Fiber &fiber = current();
    fiber.value = predicate, fiber.site = (u32)(uintptr_t)__builtin_return_address(0);
    pause(AT_BALLOT);
    return current().result;
}

__attribute__((noinline)) const void *forge_share(const void *own, u64 bytes) {
    Fiber &fiber = current();
    auto &turn = shared[fiber.shares++ % 2];
    memcpy(turn[fiber.self.thread], own, bytes < SHARED_BYTES ? bytes : SHARED_BYTES);
    fiber.lane = 0, fiber.site = (u32)(uintptr_t)__builtin_return_address(0);
    pause(AT_SHUFFLE);
    return turn[fiber.self.thread - fiber.self.lane];
}

// clang calls this for an index outside an array of known size (-fsanitize=array-bounds).
void __ubsan_handle_out_of_bounds(void *data, u64 index) {
    struct Location { const char *file; u32 line, column; } *where = (Location *)data;
    snprintf(message, sizeof message, "line %u, thread %u: index %lld is outside the array", where->line, forge_self->thread, (long long)index);
    next(&current().context);
}
void __ubsan_handle_out_of_bounds_abort(void *data, u64 index) { __ubsan_handle_out_of_bounds(data, index); }

// Runs a grid. Returns what went wrong, or an empty text.
static const char *run_grid(void (*function)(void **), void **args, const u32 *grid, u32 threads, u32 wave, u64 seed, char *lds, u64 lds_bytes) {
    message[0] = 0;
    kernel = function, arguments = args, forge_wave = wave, random_state = seed * 2654435761u + 1;
    for (u32 i = 0; i < threads; ++i)
        if (!fibers[i].stack) fibers[i].stack = (char *)malloc(STACK);
    for (u32 z = 0; z < grid[2]; ++z)
        for (u32 y = 0; y < grid[1]; ++y)
            for (u32 x = 0; x < grid[0]; ++x) {
                memset(lds, 0xff, lds_bytes); // NaN
                for (u32 i = 0; i < threads; ++i) {
                    fibers[i].self = ForgeThread{i, i % wave, {x, y, z}};
                    prepare(fibers[i]);
                }
                run_block(threads, seed != 0);
                if (message[0]) {
                    size_t end = strlen(message);
                    snprintf(message + end, sizeof message - end, " (block %u, %u, %u)", x, y, z);
                    return message;
                }
            }
    return message;
}

// With `flush`, float32 subnormals are zeros, as what is read and as what comes out: so do kernels on AMD compute.
const char *forge_launch(void (*function)(void **), void **args, const u32 *grid, u32 threads, u32 wave, u64 seed, char *lds, u64 lds_bytes, u32 flush) {
    const u32 mode = _mm_getcsr();
    if (flush) _mm_setcsr(mode | 0x8040); // flush to zero, denormals are zeros
    const char *fault = run_grid(function, args, grid, threads, wave, seed, lds, lds_bytes);
    _mm_setcsr(mode);
    return fault;
}
}
