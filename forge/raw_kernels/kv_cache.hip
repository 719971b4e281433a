// Whole pages of the KV cache, and single slots.

// A block copies a part of one page, in one layer, of keys (z = 0) or of values.
KERNEL(256) copy_page(f16 *k_pages, f16 *v_pages, u32 source, u32 target, u32 pages, u32 size) {
    f16 *all = BLOCK_Z ? v_pages : k_pages;
    const f16 *from = all + ((u64)BLOCK_Y * pages + source) * size;
    f16 *to = all + ((u64)BLOCK_Y * pages + target) * size;
    u32 i = (BLOCK_X * 256 + THREAD) * 8;
    if (size % 8 == 0) {
        if (i < size) *(f16x8 *)(to + i) = *(const f16x8 *)(from + i);
    } else {
        for (u32 j = i; j < size && j < i + 8; ++j) to[j] = from[j];
    }
}

// A block per slot.
KERNEL(256) take_slots(const i32 *slots, const f16 *pages, f16 *y, u32 size) {
    const f16 *from = pages + (u64)slots[BLOCK_X] * size;
    f16 *to = y + (u64)BLOCK_X * size;
    for (u32 i = THREAD; i < size; i += 256) to[i] = from[i];
}
