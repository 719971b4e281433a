// Whole pages of the KV cache, and single slots.

// A block copies a part of one page, in one layer, of keys (z = 0) or of values.
KERNEL(256) copy_page(
    f16 *k_pages, // (layers, N, P, G, D)
    f16 *v_pages, // (layers, N, P, G, D)
    u32 source,   // page
    u32 target,   // page
    u32 pages,    // N
    u32 size      // P * G * D
) {
    f16 *all = BLOCK_Z ? v_pages : k_pages;
    const f16 *from = all + ((u64)BLOCK_Y * pages + source) * size;
    f16 *to = all + ((u64)BLOCK_Y * pages + target) * size;
    u32 i = (BLOCK_X * 256 + THREAD) * 8;
    if (size % 8 == 0) {
        if (i < size) store(to + i, load<8>(from + i));
    } else {
        for (u32 j = i; j < size && j < i + 8; ++j) to[j] = from[j];
    }
}

// A block per slot.
KERNEL(256) take_slots(
    const i32 *slots, // (T,)
    const f16 *pages, // (N * P, G, D)
    f16 *y,           // (T, G, D) pages[slots]
    u32 size          // G * D
) {
    const f16 *from = pages + (u64)slots[BLOCK_X] * size;
    f16 *to = y + (u64)BLOCK_X * size;
    for (u32 i = THREAD; i < size; i += 256) to[i] = from[i];
}
