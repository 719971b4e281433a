// Runs kernels of raw_kernels/ on a CPU: one fiber per GPU thread, barriers and wave collectives as rendezvous.
//
// Without a seed, blocks, waves and lanes run in their order. With one, blocks start in an order drawn from it and several
// are under way at a time, whose waves take turns, as do the lanes within one: a wave is left at a barrier, and now and
// then at a collective. Code that relies on an order that the GPU does not promise gives other results under another
// seed. LDS holds NaN, or with a seed any numbers, before each block. What a GPU would hang on or leave undefined is an
// error: a barrier or a collective that some threads do not reach, a read of a lane outside the wave, an index outside an
// LDS array, memory that is nobody's, blocks that hand results on without the fences that the prelude asks for, and waves
// that all wait for each other.

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
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

enum State { READY, AT_BARRIER, AT_SHUFFLE, AT_BALLOT, WAITING, DONE };
enum Turn { STOPPED, LEFT, STUCK };

// What a thread has started and not yet awaited, in batches.
struct Started {
    void (*finish)(void *const *);
    void *arguments[4];
    u32 batch;
};
const u32 MOST_STARTED = 8;

struct Fiber {
    ForgeThread self; // first: forge_self points here
    State state;
    u32 site, lane; // of a collective: where it stands in the program, and the lane to read
    u64 value, result;
    const u64 *awaited; // WAITING: until the bits of `mask` there differ from `value`
    u64 mask;
    Started started[MOST_STARTED];
    u32 num_started, batch; // the batch that is being started
    u32 shares; // how often it has shared
    u32 fenced; // barriers of its block before its last fence, counted from 1; 0: none
    void *context; // its stack pointer while others run
    char *stack;
};

const size_t STACK = 256 << 10;
const u64 SHARED_BYTES = 64;
const u32 MOST = 1024;
const u32 MOST_BLOCKS = 8, MOST_FIBERS = 2048; // under way at a time
const u64 MOST_LDS = 256 << 10;

struct Block {
    Fiber fibers[MOST];
    char shared[2][MOST][SHARED_BYTES]; // in turns: who is ahead by one leaves alone what the others still read
    char lds[MOST_LDS];                 // while another block runs
    u32 waves[MOST];                    // first those that have come to the barrier
    u32 num_waves, arrived;
    u32 phase;   // barriers behind it, and 1
    u32 counted; // the phase in which it counted itself; 0: not yet
    u32 stuck;   // turns without a step since the last
    u32 named_arrived[16];
    u64 named_phase[16];
};
Block *blocks[MOST_BLOCKS];
Block *running;
void *scheduler;
char message[512];
u64 fault_address;
void (*kernel)(void **);
void **arguments;
u64 random_state;
bool shuffled;
volatile bool in_fiber;
char *lds;
u64 lds_bytes;
u64 counters, counters_bytes; // where blocks count that hand on results
char noise[2 * MOST_LDS];

u32 draw(u32 below) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)((random_state >> 33) % below);
}

Fiber &current() { return *reinterpret_cast<Fiber *>(forge_self); }

u32 next_lane;
u32 lane_order[64];

// Leave for the next lane of the wave that can run, or for the scheduler if there is none, or after a fault.
void next(void **from) {
    while (!message[0] && next_lane < forge_wave) {
        Fiber &fiber = running->fibers[lane_order[next_lane++]];
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

// As if the fiber had been left just before its first instruction. Stacks begin at other places in their pages: at the same
// ones they would share a few lines of the cache.
void prepare(Fiber &fiber, u32 thread) {
    if (!fiber.stack) fiber.stack = (char *)malloc(STACK);
    u64 end = ((u64)fiber.stack + STACK & ~(u64)15) - thread * 704 % 16384;
    void **top = (void **)end - 2; // a function begins 8 bytes off a multiple of 16
    *top = (void *)start;
    fiber.context = top - 6;
    fiber.shares = fiber.fenced = fiber.num_started = fiber.batch = 0;
    fiber.state = READY;
}

void order(u32 *items, u32 count, u32 first) {
    for (u32 i = 0; i < count; ++i) items[i] = first + i;
    for (u32 i = count; shuffled && i > 1; --i) {
        u32 j = draw(i), t = items[i - 1];
        items[i - 1] = items[j];
        items[j] = t;
    }
}

// All lanes of a wave stand at the same collective: give each its result.
void exchange(u32 first) {
    Fiber *wave = running->fibers + first;
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

// Makes a lane ready that waits for what has come true. Whether it is ready.
bool wake(Fiber &fiber) {
    if (fiber.state == WAITING && (*fiber.awaited & fiber.mask) != fiber.value) fiber.state = READY;
    return fiber.state == READY;
}

// Until its lanes stand at a barrier or have ended (STOPPED), or some of them wait for other waves (LEFT; STUCK: none took a step);
// with a seed, now and then only until a collective (LEFT).
Turn run_wave(u32 first) {
    for (bool moved = false;; moved = true) {
        u32 ready = 0, waiting = 0, collective = 0;
        for (u32 i = 0; i < forge_wave; ++i) {
            Fiber &fiber = running->fibers[first + i];
            ready += wake(fiber);
            waiting += fiber.state == WAITING;
            collective += fiber.state == AT_SHUFFLE || fiber.state == AT_BALLOT;
        }
        if (ready) {
            order(lane_order, forge_wave, first);
            next_lane = 0;
            in_fiber = true;
            next(&scheduler);
            in_fiber = false;
            if (message[0]) return STOPPED;
        } else if (waiting) {
            return moved ? LEFT : STUCK;
        } else if (collective == 0) {
            return STOPPED;
        } else if (collective < forge_wave) {
            snprintf(message, sizeof message, "thread %u: a shuffle or ballot that only %u of %u lanes reach", first, collective, forge_wave);
            return STOPPED;
        } else {
            exchange(first);
            if (message[0]) return STOPPED;
            if (shuffled && draw(8) == 0) return LEFT;
        }
    }
}

// All waves of the block have come to a barrier, or ended: whether it has.
bool pass_barrier(u32 threads) {
    Fiber *fibers = running->fibers;
    u32 done = 0;
    for (u32 i = 0; i < threads; ++i) done += fibers[i].state == DONE;
    if (done == threads) return true;
    if (done) {
        snprintf(message, sizeof message, "a barrier that %u of %u threads do not reach", done, threads);
        return true;
    }
    for (u32 i = 0; i < threads; ++i) {
        if (fibers[i].site != fibers[0].site) {
            snprintf(message, sizeof message, "thread %u: a barrier in a branch that thread 0 does not take", i);
            return true;
        }
        if (running->counted && running->phase > running->counted && fibers[i].fenced <= running->counted) {
            snprintf(message, sizeof message, "thread %u: goes on behind the count without a fence", i);
            return true;
        }
        fibers[i].state = READY;
    }
    running->phase += 1;
    order(running->waves, running->num_waves, 0);
    running->arrived = 0;
    return false;
}

// No wave took a step in its turn: whether none can take one.
void find_deadlock(u32 threads) {
    u32 last = 0;
    for (u32 i = 0; i < threads; ++i) {
        if (wake(running->fibers[i])) return;
        if (running->fibers[i].state == WAITING) last = i;
    }
    snprintf(message, sizeof message, "thread %u: waits for a barrier at which too few will arrive", last);
}

// The next wave of the running block; whether the block has ended.
bool step(u32 threads) {
    Block &b = *running;
    u32 left = b.num_waves - b.arrived, at = b.arrived + (shuffled ? draw(left) : b.stuck % left), wave = b.waves[at];
    b.waves[at] = b.waves[b.arrived];
    b.waves[b.arrived] = wave;
    Turn turn = run_wave(wave * forge_wave);
    b.arrived += turn == STOPPED;
    b.stuck = turn == STUCK ? b.stuck + 1 : 0;
    if (b.stuck) find_deadlock(threads);
    return message[0] || (b.arrived == b.num_waves && pass_barrier(threads));
}

void begin(Block &b, const u32 *at, u32 threads) {
    for (u32 i = 0; i < threads; ++i) {
        b.fibers[i].self = ForgeThread{i, i % forge_wave, {at[0], at[1], at[2]}};
        prepare(b.fibers[i], i);
    }
    b.num_waves = threads / forge_wave, b.arrived = 0, b.phase = 1, b.counted = 0, b.stuck = 0;
    memset(b.named_arrived, 0, sizeof b.named_arrived);
    running = &b;
    order(b.waves, b.num_waves, 0);
}

// What LDS holds before a block: NaN, or numbers.
void fill(char *to) {
    if (shuffled)
        memcpy(to, noise + draw(MOST_LDS / 64) * 64, lds_bytes);
    else
        memset(to, 0xff, lds_bytes);
}

void fault(const char *how) {
    u32 thread = forge_self->thread;
    snprintf(message, sizeof message, "thread %u: %s", thread, how);
}

// Where a fiber goes on that has touched what nobody may touch: to the scheduler, for good.
void leave() {
    next(&current().context);
    abort();
}

struct sigaction before[2];
char signal_stack[64 << 10];

void on_signal(int number, siginfo_t *info, void *context) {
    if (!in_fiber) { // not a kernel's: as if nobody had asked
        sigaction(SIGSEGV, &before[0], nullptr);
        sigaction(SIGBUS, &before[1], nullptr);
        return;
    }
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    fault_address = (u64)info->si_addr;
    fault(registers[REG_ERR] & 2 ? "writes to memory that is no array's" : "reads memory that is no array's");
    registers[REG_RSP] = (registers[REG_RSP] - 512 & ~(greg_t)15) - 8;
    registers[REG_RIP] = (greg_t)leave;
}

// A barrier with phases as it lies in LDS here: arrivals that the phase still waits for, arrivals of a phase, multiples of 16 bytes
// that it waits for, a mark, the phase.
const u64 ARRIVALS = (1 << 12) - 1, BYTES = 0xffffull << 24, MARK = 0x5a5a5ull << 40, MARKED = 0xfffffull << 40, PHASE = 1ull << 63;

void check_barrier(const u64 *at) {
    bool is_lds = (u64)at - (u64)lds < lds_bytes;
    if (is_lds && (*at & MARKED) == MARK) return;
    fault(is_lds ? "a barrier that was not initialized" : "a barrier outside LDS");
    leave();
}

void wait(const u64 *at, u64 mask, u64 value) {
    Fiber &fiber = current();
    fiber.awaited = at, fiber.mask = mask, fiber.value = value;
    if ((*at & mask) == value) pause(WAITING);
}

void run_grid(const u32 *grid, u32 threads) {
    u64 total = (u64)grid[0] * grid[1] * grid[2], started = 0;
    u32 most = MOST_FIBERS / threads;
    most = !shuffled ? 1 : most > MOST_BLOCKS ? MOST_BLOCKS : most < 1 ? 1 : most;
    // Blocks in an order of their own: each number once, because the step has no factor in common with how many there are.
    u64 factor = 1, offset = 0;
    if (shuffled && total > 1) {
        offset = draw((u32)total);
        for (bool fits = false; !fits;) {
            factor = 1 + draw((u32)total);
            u64 a = total, b = factor;
            while (b) {
                u64 rest = a % b;
                a = b, b = rest;
            }
            fits = a == 1;
        }
    }
    u32 alive = 0, own = 0, burst = 0;
    auto enter = [&](u32 slot) {
        u64 n = (started++ * factor + offset) % total;
        u32 at[3] = {(u32)(n % grid[0]), (u32)(n / grid[0] % grid[1]), (u32)(n / grid[0] / grid[1])};
        if (!blocks[slot]) blocks[slot] = (Block *)calloc(1, sizeof(Block));
        begin(*blocks[slot], at, threads);
    };
    while (alive < most && started < total) {
        enter(alive);
        fill(blocks[alive]->lds);
        ++alive;
    }
    running = blocks[0];
    memcpy(lds, running->lds, lds_bytes);
    while (alive) {
        if (alive > 1 && burst-- == 0) { // short turns and long ones
            burst = draw(1 << draw(7));
            u32 other = draw(alive);
            if (other != own) {
                memcpy(blocks[own]->lds, lds, lds_bytes);
                memcpy(lds, blocks[other]->lds, lds_bytes);
                own = other;
            }
        }
        running = blocks[own];
        if (!step(threads)) continue;
        if (message[0]) {
            const u32 *at = running->fibers[0].self.block;
            size_t end = strlen(message);
            snprintf(message + end, sizeof message - end, " (block %u, %u, %u)", at[0], at[1], at[2]);
            return;
        }
        if (started < total) {
            enter(own);
            fill(lds);
        } else {
            Block *ended = blocks[own];
            blocks[own] = blocks[--alive];
            blocks[alive] = ended;
            if (alive) own = own < alive ? own : 0, memcpy(lds, blocks[own]->lds, lds_bytes);
            burst = 0;
        }
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
    auto &turn = running->shared[fiber.shares++ % 2];
    memcpy(turn[fiber.self.thread], own, bytes < SHARED_BYTES ? bytes : SHARED_BYTES);
    fiber.lane = 0, fiber.site = (u32)(uintptr_t)__builtin_return_address(0);
    pause(AT_SHUFFLE);
    return turn[fiber.self.thread - fiber.self.lane];
}

void forge_phase_init(u64 *at, u32 arrivals) { *at = MARK | (u64)arrivals << 12 | arrivals; }

void end_phase(u64 *at) {
    if ((*at & (ARRIVALS | BYTES)) == 0) *at = (*at ^ PHASE) | (*at >> 12 & ARRIVALS);
}

// More bytes that the phase waits for, or fewer, counted modulo a megabyte.
void forge_phase_expect(u64 *at, u32 bytes) {
    check_barrier(at);
    *at = (*at & ~BYTES) | ((*at & BYTES) + ((u64)(bytes / 16) << 24) & BYTES);
    if (bytes >> 31) end_phase(at);
}

void forge_phase_arrive(u64 *at) {
    check_barrier(at);
    if ((*at & ARRIVALS) == 0) return fault("arrives at a barrier that waits for nobody"), leave();
    *at -= 1;
    end_phase(at);
}

void forge_phase_wait(const u64 *at, u32 parity) {
    check_barrier(at);
    wait(at, PHASE, parity ? PHASE : 0);
}

void forge_named_barrier(u32 id, u32 threads, u32 waits) {
    Block &b = *running;
    u64 phase = b.named_phase[id];
    if (++b.named_arrived[id] == threads) b.named_arrived[id] = 0, ++b.named_phase[id];
    if (waits) wait(&b.named_phase[id], ~0ull, phase);
}

// Matrix products that run beside the thread: they are computed no earlier than the thread waits for them, so that what it does to
// their operands before that shows.
void forge_start(void (*finish)(void *const *), void *a, void *b, void *c, void *d) {
    Fiber &fiber = current();
    if (fiber.num_started == MOST_STARTED) return fault("starts too much without a wait"), leave();
    fiber.started[fiber.num_started++] = Started{finish, {a, b, c, d}, fiber.batch};
}

void forge_commit() { ++current().batch; }

void forge_await(u32 batches) {
    Fiber &fiber = current();
    u32 done = 0;
    for (; done < fiber.num_started && fiber.started[done].batch + batches < fiber.batch; ++done) fiber.started[done].finish(fiber.started[done].arguments);
    for (u32 i = done; i < fiber.num_started; ++i) fiber.started[i - done] = fiber.started[i];
    fiber.num_started -= done;
}

void forge_fence() { current().fenced = running->phase; }

// Before an atomic addition. Where blocks count that hand on results, all threads of this one have fenced theirs and met.
void forge_count(const void *at) {
    if ((u64)at - counters >= counters_bytes) return;
    u32 threads = running->num_waves * forge_wave;
    for (u32 i = 0; i < threads; ++i) {
        u32 fenced = running->fibers[i].fenced;
        if (fenced && fenced < running->phase) continue;
        snprintf(message, sizeof message, "thread %u: %s before the block counts itself", i, fenced ? "meets at no barrier behind its fence" : "does not fence what it stored");
        leave();
    }
    running->counted = running->phase;
}

// clang calls this for an index outside an array of known size (-fsanitize=array-bounds).
void __ubsan_handle_out_of_bounds(void *data, u64 index) {
    struct Location { const char *file; u32 line, column; } *where = (Location *)data;
    snprintf(message, sizeof message, "line %u, thread %u: index %lld is outside the array", where->line, forge_self->thread, (long long)index);
    next(&current().context);
}
void __ubsan_handle_out_of_bounds_abort(void *data, u64 index) { __ubsan_handle_out_of_bounds(data, index); }

// What the last launch touched that is nobody's, or 0.
u64 forge_fault_address() { return fault_address; }

// Runs a grid. Returns what went wrong, or an empty text. With `flush`, float32 subnormals are zeros, as what is read and as
// what comes out: so do kernels on AMD compute. `counts` is where blocks count that hand on results.
const char *forge_launch(void (*function)(void **), void **args, const u32 *grid, u32 threads, u32 wave, u64 seed, char *shared, u64 shared_bytes, u32 flush, u64 counts, u64 counts_bytes) {
    message[0] = 0, fault_address = 0;
    kernel = function, arguments = args, forge_wave = wave, random_state = seed * 2654435761u + 1, shuffled = seed != 0;
    lds = shared, lds_bytes = shared_bytes, counters = counts, counters_bytes = counts_bytes;
    if (lds_bytes > MOST_LDS) return "more LDS than there is";
    for (u32 i = 0, x = 1; i < sizeof noise && !noise[sizeof noise - 1]; ++i) noise[i] = (x = x * 1664525 + 1013904223) >> 24 | 1;

    stack_t own_stack = {signal_stack, 0, sizeof signal_stack}, other_stack;
    sigaltstack(&own_stack, &other_stack);
    struct sigaction handler = {};
    handler.sa_sigaction = on_signal, handler.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &handler, &before[0]);
    sigaction(SIGBUS, &handler, &before[1]);
    const u32 mode = _mm_getcsr();
    if (flush) _mm_setcsr(mode | 0x8040); // flush to zero, denormals are zeros
    run_grid(grid, threads);
    _mm_setcsr(mode);
    sigaction(SIGSEGV, &before[0], nullptr);
    sigaction(SIGBUS, &before[1], nullptr);
    sigaltstack(&other_stack, nullptr);
    return message;
}
}
