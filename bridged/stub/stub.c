/* The second-stage loader: runs in the target's RAM and takes over the UART from ST's ROM loader.
 *
 * Why: the ROM loader has a one-byte receiver without flow control and programs between two bytes, so every block costs a round
 * trip and is read back for proof. This one is fed by DMA into a ring, acknowledges whole frames with a CRC-32, programs while
 * the next frames arrive, and computes the proof on the target.
 *
 * What it does not know: chips (stub.h), images, or when to erase. It uses no interrupt, no stack beyond 512 bytes, no memory
 * but the context, the ring, the block and that stack.
 *
 * Rules:
 * - Every loop that waits calls now(), which refreshes the watchdog, counts cycles, and empties the inlet that the DMA fills
 *   into the ring (cycles() does not, where no bytes may come). So the ring can be larger than the DMA can count, and take in a
 *   whole sector while the one before it is erased.
 * - A frame counts only when its CRC is right. The verbs that change flash are sequenced: executed once each, in the order of
 *   their numbers, and `expected` moves on only after success. So the answer to number n says that all up to n are done.
 * - Nothing is programmed over anything: a unit that holds the wanted bytes is left alone, one that is not blank is refused.
 * - The flash controller is locked whenever no command is at work.
 *
 * Frame, both ways: A5, verb, number, length (2), header check (2), payload, CRC-32 (4); little-endian. The header check is the
 * low half of the running CRC after the first four bytes; the CRC-32 is that of zlib over everything after A5, so that the
 * running value after a good frame is RESIDUE.
 */
#include "stub.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;

#define INLINE static inline __attribute__((always_inline))
#define CALL static __attribute__((noinline))

#define MARK 0xA5
#define CRC_POLYNOMIAL 0xEDB88320u
#define RESIDUE 0xDEBB20E3u /* the running CRC-32 after a message and its CRC */
#define HEADER 6
#define PIECE 256 /* bytes handled between two looks at clock and watchdog */

#define TICKS 0x00FFFFFFu
#define SYSTICK 0xE000E010u
#define CPUID 0xE000ED00u
#define VTOR 0xE000ED08u
#define AIRCR 0xE000ED0Cu
#define CCR 0xE000ED14u
#define RESET_REQUEST 0x05FA0004u

#define IWDG_REFRESH 0xAAAAu
#define TRANSMIT_EMPTY 0x80u /* the same two bits in both USART layouts */
#define TRANSMIT_COMPLETE 0x40u
#define FLASH_KEY1 0x45670123u
#define FLASH_KEY2 0xCDEF89ABu
#define ERASED 0xFFFFFFFFu

#ifdef STUB_ON_HOST
/* tests/stub/host.c has these, over arrays, to run this very code under the sanitizers of a PC. */
#include "on_host.h"
#else
extern struct context context __attribute__((visibility("hidden")));

#define MEMORY(address) ((u8 *)(address))
INLINE u32 get(u32 address) { return *(volatile u32 *)address; }
INLINE void put(u32 address, u32 value) { *(volatile u32 *)address = value; }
INLINE void store(u32 address, u32 value, u32 width)
{
    if (width == 4)
        *(volatile u32 *)address = value;
    else if (width == 2)
        *(volatile u16 *)address = (u16)value;
    else
        *(volatile u8 *)address = (u8)value;
}
INLINE void barrier(void) { __asm__ volatile("dsb" ::: "memory"); }

__attribute__((noreturn)) static void jump(u32 stack, u32 entry)
{
    /* As after a reset: interrupts enabled, and nothing of ours on the stack. */
    __asm__ volatile("msr msp, %0\n cpsie i\n bx %1" ::"r"(stack), "r"(entry));
    __builtin_unreachable();
}

__attribute__((noreturn, used)) void run(void);

/* The ROM loader has set the stack pointer already; whether it then pushes something is its affair, so it is set again. */
__attribute__((naked, used, section(".start"))) void start(void)
{
    __asm__ volatile("cpsid i\n"
                     "mov r0, pc\n" /* start + 6 */
                     "ldr r1, =%c0 + 6\n"
                     "subs r0, r0, r1\n"
                     "ldr r0, [r0]\n"
                     "mov sp, r0\n"
                     "b run\n"
                     ".ltorg\n" ::"i"(CODE_OFFSET));
}
#endif

#define C context

/* --- time ----------------------------------------------------------------------------------------------------------- */

/* Move what the DMA has received into the ring. The host has no more under way than fits there. */
INLINE void pump(void)
{
    u32 end = (C.inlet_mask + 1 - get(C.remaining)) & C.inlet_mask, taken = C.taken, written = C.written;
    if (taken == end)
        return;
    barrier(); /* the count first, then the bytes */
    const u8 *inlet = MEMORY(C.inlet);
    u8 *ring = MEMORY(C.ring);
    do {
        ring[written] = inlet[taken];
        taken = (taken + 1) & C.inlet_mask;
        written = (written + 1) & C.ring_mask;
    } while (taken != end);
    C.taken = taken;
    C.written = written;
}

/* CPU cycles since the start, modulo 2^32. Must be called more often than SysTick wraps (2^24 cycles). */
CALL u32 cycles(void)
{
    put(C.watchdog, IWDG_REFRESH);
    u32 tick = get(SYSTICK + 8);
    u32 time = C.time + ((C.tick - tick) & TICKS); /* it counts down */
    C.tick = tick;
    C.time = time;
    return time;
}

/* The same where bytes may come; must be called more often than they fill the inlet. */
CALL u32 now(void)
{
    pump();
    return cycles();
}

static void wait_for(u32 status_bit)
{
    while (!(get(C.usart_status) & status_bit))
        now();
}

/* --- CRC-32 --------------------------------------------------------------------------------------------------------- */

/* Most of what the CPU does with a byte is its CRC, twice. The table is made in RAM, not sent: a KiB takes a quarter of a second
 * on the way in. */
#define TABLE ((u32 *)MEMORY(C.table))

static void make_table(void)
{
    /* Of the numbers with one bit first, then of their sums: the CRC of a sum is that of its parts, by exclusive or. */
    u32 *table = TABLE, crc = 1;
    table[0] = 0;
    for (u32 bit = 128; bit; bit >>= 1) {
        crc = crc >> 1 ^ (CRC_POLYNOMIAL & -(crc & 1));
        for (u32 n = 0; n < 256; n += 2 * bit)
            table[n + bit] = table[n] ^ crc;
    }
}

INLINE u32 crc_step(const u32 *table, u32 crc, u8 byte) { return crc >> 8 ^ table[(u8)(crc ^ byte)]; }

CALL u32 crc_of(const u8 *at, u32 count)
{
    const u32 *table = TABLE;
    u32 crc = ~0u;
    while (count) {
        now();
        u32 piece = count < PIECE ? count : PIECE;
        count -= piece;
        do
            crc = crc_step(table, crc, *at++);
        while (--piece);
    }
    return ~crc;
}

/* --- sending -------------------------------------------------------------------------------------------------------- */

CALL void send(const void *data, u32 count)
{
    const u8 *at = data;
    while (count--) {
        u8 byte = *at++;
        C.crc = crc_step(TABLE, C.crc, byte);
        wait_for(TRANSMIT_EMPTY);
        put(C.usart_data, byte);
    }
}

CALL void answer(u32 verb, u32 number, const void *payload, u32 count)
{
    u32 head = (verb | ANSWER) | number << 8 | count << 16;
    u32 word = MARK;
    send(&word, 1);
    C.crc = ~0u;
    send(&head, 4);
    word = C.crc;
    send(&word, 2);
    send(payload, count);
    word = ~C.crc;
    send(&word, 4);
}

/* `once`: not again before a frame came in sequence, for one fault leaves many frames that cannot be used. */
static void refuse(u32 number, u32 reason, int once)
{
    if (once && C.rejected)
        return;
    C.rejected = 1;
    C.reason = reason;
    answer(NAK, number, &C.expected, 16);
}

static void greet(void) { answer(HELLO, 0, &C.protocol, 36); }

/* --- receiving ------------------------------------------------------------------------------------------------------ */

/* Bytes in the ring that were not taken. */
INLINE u32 filled(void) { return (C.written - C.read) & C.ring_mask; }

/* Take `count` bytes; 0 when the line was silent for too long. The ring takes in more meanwhile. */
CALL int take(u8 *to, u32 count)
{
    u32 begun = now();
    const u32 *table = TABLE;
    while (count) {
        u32 piece = filled(), read = C.read, to_end = C.ring_mask + 1 - read;
        if (!piece) {
            if (now() - begun > C.byte_limit)
                return 0;
            continue;
        }
        if (piece > count)
            piece = count;
        if (piece > PIECE)
            piece = PIECE;
        if (piece > to_end)
            piece = to_end;
        count -= piece;
        C.read = (read + piece) & C.ring_mask;
        const u8 *from = MEMORY(C.ring) + read;
        u32 crc = C.crc;
        do {
            u8 byte = *from++;
            crc = crc_step(table, crc, byte);
            *to++ = byte;
        } while (--piece);
        C.crc = crc;
        begun = now();
    }
    return 1;
}

/* --- the line's rate ------------------------------------------------------------------------------------------------ */

static void set_rate(u32 brr)
{
    C.brr = brr;
    put(C.usart_cr1, C.cr1_off); /* BRR may change only while the USART is off (layout 2) */
    put(C.usart_brr, brr);
    put(C.usart_cr1, C.cr1_on);
}

/* Wait until the RX pin is `high`; 0 when it takes too long. */
static int pin_is(int high, u32 limit)
{
    u32 begun = cycles();
    while (((get(C.rx_input) & C.rx_mask) != 0) != high)
        if (cycles() - begun > limit)
            return 0;
    return 1;
}

/* Cycles of 64 periods on the RX pin, 0 without a signal. 0x55 after 0x55 is a square wave of two bits a period. */
CALL u32 periods(u32 limit)
{
    u32 first = 0;
    for (u32 n = 0; n <= 64; n++) {
        if (!pin_is(1, limit) || !pin_is(0, limit))
            return 0;
        if (n == 0)
            first = C.time;
        limit = C.byte_limit;
    }
    return C.time - first;
}

/* The oscillator may be off by percents: take the bit length from the host's train. Two measurements must agree, for a pause
 * of the host's adapter within a train would make one of them longer. */
static void measure(void)
{
    u32 one = periods(C.greet_every);
    u32 two = one ? periods(C.byte_limit) : 0;
    u32 off = one > two ? one - two : two - one;
    if (!two || off > (one >> 6))
        return;
    u32 nominal = C.brr << 8, train = one + two;
    off = train > nominal ? train - nominal : nominal - train;
    if (off > (nominal >> 3)) /* no oscillator is off by an eighth: it was no train */
        return;
    C.train = train;
    set_rate((train + 128) >> 8);
}

static void begin_waiting(u32 what)
{
    C.waiting = what;
    C.since = now();
}

/* What has to be done when no good frame comes. */
static void look_at_clock(void)
{
    u32 past = now() - C.since;
    if (C.waiting == FOR_FIRST_FRAME && past > C.greet_every) {
        if (C.rx_input)
            measure();
        greet();
        begin_waiting(FOR_FIRST_FRAME);
    } else if (C.waiting == FOR_CONFIRMATION && past > C.confirm_within) {
        set_rate(C.old_brr);
        C.waiting = FOR_FRAME;
    }
}

/* --- flash ---------------------------------------------------------------------------------------------------------- */

static int fail(u32 reason, u32 where, u32 detail)
{
    C.reason = reason;
    C.where = where;
    C.detail = detail;
    return (int)reason;
}

CALL u32 settle(u32 bank)
{
    u32 status;
    barrier(); /* what was written must have reached the controller before it is asked whether it is busy */
    while ((status = get(bank + C.status_at)) & C.busy)
        now();
    return status & C.errors;
}

/* Unlock the controller of `address`, clear its errors and set its control register; returns its registers. */
CALL u32 open(u32 address, u32 control)
{
    u32 bank = C.flash_base;
    if (address >= C.bank2_start)
        bank += C.bank2_step;
    settle(bank);
    if (get(bank + C.control_at) & C.lock) {
        put(bank + C.key_at, FLASH_KEY1);
        put(bank + C.key_at, FLASH_KEY2);
    }
    put(bank + C.clear_at, C.clear);
    put(bank + C.control_at, control);
    return bank;
}

CALL int in_flash(u32 address, u32 count)
{
    /* Written so that nothing wraps; and no range spans two controllers. */
    if (address < C.flash_start || address >= C.flash_end || count > C.flash_end - address)
        return 0;
    return address >= C.bank2_start || count <= C.bank2_start - address;
}

static int erase(u32 address, u32 code, u32 count)
{
    if (!in_flash(address, count) || (address | count) & 3)
        return fail(BAD_ARGUMENT, address, count);
    u32 control = C.erase | code << C.sector_shift;
    u32 bank = open(address, control);
    if (C.address_at)
        put(bank + C.address_at, address);
    put(bank + C.control_at, control | C.start);
    u32 errors = settle(bank);
    put(bank + C.control_at, C.lock);
    if (errors)
        return fail(FLASH_ERROR, address, errors);
    for (const u32 *at = (const u32 *)MEMORY(address); count; count -= 4, address += 4, at++) {
        if (!(address & (PIECE - 1)))
            now();
        if (*at != ERASED)
            return fail(NOT_ERASED, address, *at);
    }
    return 0;
}

INLINE u32 load(const u8 *at, u32 width)
{
    return width == 4 ? *(const volatile u32 *)at : width == 2 ? *(const volatile u16 *)at : *(const volatile u8 *)at;
}

/* Whether a unit of flash differs from the wanted bytes (1), and then whether it is not blank either (3). */
CALL u32 compare(u32 address, const u8 *wanted)
{
    u32 differs = 0, used = 0, width = C.width, left = C.unit;
    const u8 *at = MEMORY(address);
    /* Words by themselves: twice for each unit, this is most of what the CPU does while it programs. */
    for (; width == 4 && left; left -= 4, at += 4, wanted += 4) {
        u32 found = *(const volatile u32 *)at;
        differs |= found ^ *(const u32 *)wanted;
        used |= ~found;
    }
    for (; left; left -= width, at += width, wanted += width) {
        u32 found = load(at, width);
        differs |= found ^ load(wanted, width);
        used |= found ^ (ERASED >> (32 - 8 * width));
    }
    return !differs ? 0 : used ? 3 : 1;
}

CALL int program(u32 address, const u8 *data, u32 count)
{
    u32 unit = C.unit, width = C.width;
    if (!in_flash(address, count) || (address | count) & (unit - 1))
        return fail(BAD_ARGUMENT, address, count);
    int failed = 0;
    u32 bank = open(address, C.program);
    for (; count && !failed; count -= unit, address += unit, data += unit) {
        if (!(address & (PIECE - 1)))
            now();
        u32 state = compare(address, data);
        if (!state)
            continue;
        if (state == 3) {
            failed = fail(NOT_BLANK, address, 0);
            break;
        }
        for (u32 at = 0; at < unit; at += width)
            store(address + at, load(data + at, width), width);
        u32 errors = settle(bank);
        if (errors)
            failed = fail(FLASH_ERROR, address, errors);
        else if (compare(address, data))
            failed = fail(NOT_EQUAL, address, 0);
    }
    put(bank + C.control_at, C.lock);
    return failed;
}

/* --- verbs ---------------------------------------------------------------------------------------------------------- */

/* A sequenced verb; the reason when it failed. `at` is the block. */
static int execute(u32 verb, u8 *at, u32 count)
{
    const u32 *words = (const u32 *)at;
    int failed = 0;
    if (verb == ERASE) { /* address, code and length of each sector */
        for (; count >= 12 && !failed; count -= 12, words += 3)
            failed = erase(words[0], words[1], words[2]);
        return failed || !count ? failed : fail(BAD_ARGUMENT, 0, count);
    }
    if (verb == WRITE) /* address, then the bytes */
        return count < 4 ? fail(BAD_ARGUMENT, 0, count) : program(words[0], at + 4, count - 4);
    /* CHECK: address, length, CRC-32 of what must be there, or nothing that follows is carried out; FILL: address, length, byte */
    u32 address = words[0], left = words[1], byte = words[2];
    if (count != 12 || !in_flash(address, left))
        return fail(BAD_ARGUMENT, address, left);
    if (verb == CHECK)
        return crc_of(MEMORY(address), left) == byte ? 0 : fail(NOT_EQUAL, address, left);
    for (u32 n = 0; n < PIECE; n++)
        at[n] = (u8)byte;
    while (left && !failed) {
        u32 piece = left < PIECE ? left : PIECE;
        failed = program(address, at, piece);
        address += piece;
        left -= piece;
    }
    return failed;
}

static void sequenced(u32 verb, u32 number, u8 *at, u32 count)
{
    u32 behind = (C.expected - number) & 0xFF;
    if (C.stopped) {
        fail(STOPPED, 0, 0);
        refuse(number, STOPPED, 1);
    } else if (behind && behind < 128) { /* done before; its answer may have been lost */
        answer(verb, (C.expected - 1) & 0xFF, at, 0);
    } else if (behind) {
        C.gaps++;
        refuse(number, OUT_OF_SEQUENCE, 1);
    } else if (execute(verb, at, count)) {
        refuse(number, C.reason, 0);
    } else {
        C.expected = (C.expected + 1) & 0xFF;
        C.rejected = 0;
        answer(verb, number, at, 0);
    }
}

static void unsequenced(u32 verb, u32 number, u8 *at, u32 count)
{
    u32 *words = (u32 *)at;
    if (verb == HELLO) {
        C.expected = C.stopped = C.rejected = 0;
        answer(HELLO, number, &C.protocol, 36);
        return;
    }
    if (verb == STATUS || verb == ABORT) {
        C.stopped |= verb == ABORT;
        answer(verb, number, &C.expected, 40);
        return;
    }
    if (verb == CRC && count == 12 && words[2] <= C.block_max >> 2) { /* address, stride, count */
        u32 address = words[0], stride = words[1], left = words[2];
        count = left << 2;
        for (; left; left--, address += stride)
            *words++ = crc_of(MEMORY(address), stride);
        answer(CRC, number, at, count);
        return;
    }
    if (verb == READ && count == 8 && words[1] <= C.block_max) { /* address, length */
        answer(READ, number, MEMORY(words[0]), words[1]);
        return;
    }
    if ((verb == BAUD || verb == GO) && count == 4) { /* BRR; or the address of a vector table, 0 for a reset */
        u32 word = words[0];
        answer(verb, number, at, 0);
        wait_for(TRANSMIT_COMPLETE);
        if (verb == BAUD) {
            C.old_brr = C.brr;
            set_rate(word);
            begin_waiting(FOR_CONFIRMATION);
            return;
        }
        put(C.usart_cr1, C.cr1_off); /* no more requests for the DMA: the RAM is the application's */
        put(SYSTICK, 0);
        if (!word)
            put(AIRCR, RESET_REQUEST);
        else {
            put(VTOR, word);
            jump(get(word), get(word + 4));
        }
        for (;;)
            now();
    }
    fail(verb > GO ? BAD_VERB : BAD_ARGUMENT, 0, count);
    refuse(number, C.reason, 0);
}

/* Look for one frame and carry it out. */
CALL void serve(void)
{
    look_at_clock();
    if (!filled())
        return;
    u8 *block = MEMORY(C.block);
    u8 head[HEADER];
    u32 after_mark = (C.read + 1) & C.ring_mask;
    C.crc = ~0u;
    if (MEMORY(C.ring)[C.read] != MARK) {
        C.read = after_mark;
        return;
    }
    C.read = after_mark;
    int came = take(head, 4);
    u32 check = C.crc & 0xFFFF;
    came = came && take(head + 4, 2);
    if (!came || check != (u32)(head[4] | head[5] << 8)) {
        /* The mark may have been noise, and the real one among the bytes after it. */
        C.read = after_mark;
        C.bad_headers++;
        refuse(0, came ? BAD_HEADER : PAUSE, 1);
        return;
    }
    u32 verb = head[0], number = head[1], count = (u32)(head[2] | head[3] << 8);
    if (count > C.block_max) {
        refuse(number, TOO_LONG, 0);
        return;
    }
    if (!take(block, count) || !take(head, 4)) {
        C.pauses++;
        refuse(number, PAUSE, 1);
        return;
    }
    if (C.crc != RESIDUE) {
        C.bad_frames++;
        refuse(number, BAD_CRC, 0);
        return;
    }
    C.frames++;
    C.waiting = FOR_FRAME;
    if (verb >= ERASE && verb <= CHECK)
        sequenced(verb, number, block, count);
    else
        unsequenced(verb, number, block, count);
}

static void prepare(void)
{
    make_table();
    put(SYSTICK + 4, TICKS);
    put(SYSTICK, 5); /* on, at the CPU's clock, without interrupt */
    C.tick = get(SYSTICK + 8);
    for (u32 n = 0; n < C.poke_count; n++) {
        const struct poke *poke = &C.pokes[n];
        u32 address = poke->address & ~1u;
        if (poke->address & 1)
            while ((get(address) & poke->keep) != poke->set)
                cycles(); /* there is no DMA yet */
        else
            put(address, (get(address) & poke->keep) | poke->set);
    }
    C.cpuid = get(CPUID);
    C.ccr = get(CCR);
    set_rate(C.brr);
    begin_waiting(FOR_FIRST_FRAME);
    C.since -= C.greet_every; /* at once */
}

#ifndef STUB_ON_HOST
__attribute__((noreturn)) void run(void)
{
    prepare();
    for (;;)
        serve();
}
#endif
