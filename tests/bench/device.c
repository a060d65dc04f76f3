/* A small STM32 ROM loader (AN3155) behind a pty, in C: the one device that every host of `make bench` meets.
 *
 * It exists to pace the wire, for every host alike, and to say how well it did. It is not the simulator of the product
 * (bridged/sim): that one is strict and shows faults; this one is fast and knows the good path only. Neither is changed in
 * the same measurement as a host.
 *
 * The model. A byte takes 11 bit times (8E1) in either direction. Times are absolute: the first bit of what the host wrote is
 * on the wire when this process noticed the write, each further byte ends one byte time later, and everything that follows
 * (acknowledge, programming, answer) is computed from there. A late wake-up of this process therefore never moves the
 * bytes that come after it, and no byte is handed to the host before its time. What is late is counted.
 *
 *   - One-byte receiver: while the loader erases, programs or sends, one byte stays in the receive register and what
 *     comes on top of it is lost, and counted as an overrun. A correct host causes none.
 *   - No time-out anywhere, as in the ROM.
 *   - Flash is erased to 0xFF and programming only clears bits.
 *   - All of the time between the first byte of the host and the last one of the device is accounted for: bytes on the wire,
 *     programming, the device's own lateness, the host between an answer and its next frame, pauses inside a frame, resets.
 *     What is left in the end is for the report to name as unexplained.
 *   - It begins in the loader, so that hosts without reset lines can be measured. Lines: a Unix stream socket, one command
 *     a line, `nrst 0|1`, `boot0 0|1`, `power 0|1`, each answered `ok`; when the last connection closes they are idle.
 *     When NRST is released BOOT0 decides: high is the loader after --startup-ms, low is an application that says nothing.
 *
 * Last bytes of answers are what a host waits for. For those the process sleeps until --spin-us before their time and then
 * looks at the clock; bytes before them are sent by a sleeping clock, which is how a UART with a FIFO delivers them too.
 *
 * SIGUSR1 writes the report and begins a new one; SIGTERM or SIGINT writes it and ends. One thread, standard C and Linux.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

typedef int64_t ns_t;

enum { ACK = 0x79, NACK = 0x1F, SYNC = 0x7F, BITS_PER_BYTE = 11 };
enum { GET = 0x00, GET_VERSION = 0x01, GET_ID = 0x02, READ = 0x11, GO = 0x21, WRITE = 0x31, ERASE = 0x43, EXT_ERASE = 0x44 };
enum { RAM_BASE = 0x20000000, RAM_BYTES = 128 * 1024, TX_RING = 1024, CONNECTIONS = 8, LINE_BYTES = 64 };

/* --- parts ------------------------------------------------------------------------------------------------------ */

struct run {
    unsigned count, kib; /* count 0: as many as the flash holds */
};

struct word {
    uint32_t address, value; /* a 32-bit word that a host may read beside flash and RAM */
};

/* Addresses: ST's reference manuals (electronic signature, option bytes) and AN2606 (loader version). */
struct part {
    const char *name;
    unsigned pid, loader, flash_kib, erase_opcode;
    struct run runs[4];
    uint32_t size_at, uid_at, loader_id_at;
    uint8_t loader_id;
    uint32_t extra_from, extra_to; /* system memory, option bytes, OTP: readable */
    struct word words[4];
};

static const struct part parts[] = {
    {"F103", 0x410, 0x22, 128, ERASE, {{0, 1}}, 0x1FFFF7E0, 0x1FFFF7E8, 0, 0, 0x1FFFF000, 0x1FFFF810, {{0, 0}}},
    {"F407", 0x413, 0x31, 1024, EXT_ERASE, {{4, 16}, {1, 64}, {0, 128}}, 0x1FFF7A22, 0x1FFF7A10, 0x1FFF77DE, 0x91, 0x1FFF0000,
     0x1FFFC010, {{0x1FFFC000, 0x5510AAEF}, {0x1FFFC008, 0x0000FFFF}}},
    {"F756", 0x449, 0x31, 1024, EXT_ERASE, {{4, 32}, {1, 128}, {0, 256}}, 0x1FF0F442, 0x1FF0F420, 0x1FF0EDBE, 0x90, 0x1FF00000,
     0x1FFF0020, {{0x1FFF0010, 0xFF7F0080}, {0x1FFF0018, 0xFFBF0040}}},
    {"L476", 0x415, 0x31, 1024, EXT_ERASE, {{0, 2}}, 0x1FFF75E0, 0x1FFF7590, 0x1FFF6FFE, 0x92, 0x1FFF0000, 0x1FFFF810,
     {{0x1FFF7800, 0xFFEFF8AA}}},
};

static const struct part *part;

/* --- settings and state ----------------------------------------------------------------------------------------- */

static struct {
    bool unpaced, realtime;
    long baud; /* 0: what the host sets at its end of the pty */
    double program_us_per_word, erase_ms, startup_ms;
    long spin_us, gap_us;
    const char *link, *lines, *report, *flash_out;
    unsigned flash_out_bytes;
} set = {.realtime = true, .program_us_per_word = 16, .erase_ms = 0, .startup_ms = 10, .spin_us = 60, .gap_us = 1000};

static int master = -1, slave = -1, server = -1;
static uint8_t *flash_memory, ram[RAM_BYTES];
static size_t flash_bytes;
static volatile sig_atomic_t want_report, want_end;

/* The loader: what it expects next, and until when it does not look at its USART. */
enum state {
    UNSYNCED,
    OPCODE,
    COMPLEMENT,
    ADDRESS,
    READ_LENGTH,
    WRITE_DATA,
    ERASE_COUNT,
    ERASE_LIST,
    EXT_COUNT,
    EXT_LIST,
    APPLICATION, /* runs, or is held in reset: nobody listens */
};
static enum state state = UNSYNCED;
static uint8_t opcode, field[2 * 65536 + 8];
static size_t have, need;
static uint32_t address;
static ns_t busy_until, deaf_until;
static bool register_full;
static uint8_t register_byte;

static struct {
    bool nrst, boot0, power;
} pins = {true, false, true};

static struct connection {
    int fd;
    char line[LINE_BYTES];
    size_t used;
} connections[CONNECTIONS];

/* Bytes to the host with the time at which each has been on the wire. */
static struct {
    ns_t due[TX_RING];
    uint8_t byte[TX_RING];
    bool last[TX_RING];
    unsigned head, count;
} tx;
static ns_t rx_free, tx_free;

/* --- the report ------------------------------------------------------------------------------------------------- */

struct samples {
    ns_t *at;
    size_t count, room;
};

static struct report {
    uint64_t bytes_in, bytes_out, overruns, ignored, nacks, answers, syncs, resets;
    ns_t first_sync, last_byte, programmed, erased, wire;
    ns_t gaps_over; /* of the gaps, what lies beyond --gap-us */
    ns_t in_frames; /* nothing on the wire although a frame was not whole: the host wrote it in pieces */
    ns_t resets_took; /* from the last byte before a reset to the first one after it, once the dialogue had begun */
    struct samples late_last, late_all, gaps;
} report;
static ns_t silent_from; /* the last byte before a reset; 0: the host has spoken since */
static ns_t answered_at; /* when the last byte of the latest answer was really handed over; 0: the host has spoken since */

static ns_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (ns_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "device: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

static void keep(struct samples *s, ns_t value) {
    if (s->count == s->room) {
        s->room = s->room ? 2 * s->room : 16384;
        s->at = realloc(s->at, s->room * sizeof *s->at);
        if (!s->at) fail("no memory for samples");
    }
    s->at[s->count++] = value;
}

static int by_value(const void *a, const void *b) {
    ns_t x = *(const ns_t *)a, y = *(const ns_t *)b;
    return (x > y) - (x < y);
}

static void print_samples(FILE *out, const char *name, struct samples *s) {
    double sum = 0;
    qsort(s->at, s->count, sizeof *s->at, by_value);
    for (size_t i = 0; i < s->count; i++) sum += (double)s->at[i];
#define AT(q) (s->count ? (double)s->at[(size_t)((double)(s->count - 1) * (q))] / 1e3 : 0.0)
    fprintf(out, "\"%s\": {\"count\": %zu, \"p50_us\": %.1f, \"p90_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, \"sum_s\": %.6f}",
            name, s->count, AT(0.5), AT(0.9), AT(0.99), AT(1.0), sum / 1e9);
#undef AT
}

static void write_report(void) {
    char temporary[4096];
    FILE *out = stdout;
    if (set.flash_out) {
        FILE *dump = fopen(set.flash_out, "wb");
        size_t count = set.flash_out_bytes < flash_bytes ? set.flash_out_bytes : flash_bytes;
        if (!dump || fwrite(flash_memory, 1, count, dump) != count || fclose(dump)) fail("cannot write %s", set.flash_out);
    }
    if (set.report) {
        snprintf(temporary, sizeof temporary, "%s.part", set.report);
        out = fopen(temporary, "w");
        if (!out) fail("cannot write %s: %s", temporary, strerror(errno));
    }
    fprintf(out, "{\"part\": \"%s\", \"paced\": %s, \"realtime\": %s, \"bytes_in\": %llu, \"bytes_out\": %llu, \"overruns\": %llu, ",
            part->name, set.unpaced ? "false" : "true", set.realtime ? "true" : "false", (unsigned long long)report.bytes_in,
            (unsigned long long)report.bytes_out, (unsigned long long)report.overruns);
    fprintf(out, "\"ignored\": %llu, \"nacks\": %llu, \"answers\": %llu, \"syncs\": %llu, \"resets\": %llu, ",
            (unsigned long long)report.ignored, (unsigned long long)report.nacks, (unsigned long long)report.answers,
            (unsigned long long)report.syncs, (unsigned long long)report.resets);
    fprintf(out, "\"dialogue_s\": %.6f, \"wire_s\": %.6f, \"program_s\": %.6f, \"erase_s\": %.6f, ",
            report.first_sync ? (double)(report.last_byte - report.first_sync) / 1e9 : 0.0, (double)report.wire / 1e9,
            (double)report.programmed / 1e9, (double)report.erased / 1e9);
    fprintf(out, "\"gaps_over_s\": %.6f, \"in_frames_s\": %.6f, \"resets_s\": %.6f, ", (double)report.gaps_over / 1e9,
            (double)report.in_frames / 1e9, (double)report.resets_took / 1e9);
    print_samples(out, "late_last", &report.late_last);
    fprintf(out, ", ");
    print_samples(out, "late_all", &report.late_all);
    fprintf(out, ", ");
    print_samples(out, "gaps", &report.gaps);
    fprintf(out, "}\n");
    if (fflush(out) || ferror(out)) fail("cannot write the report");
    if (set.report) {
        fclose(out);
        if (rename(temporary, set.report)) fail("cannot rename %s: %s", temporary, strerror(errno));
    }
    struct samples a = report.late_last, b = report.late_all, c = report.gaps;
    silent_from = 0;
    report = (struct report){.late_last = {a.at, 0, a.room}, .late_all = {b.at, 0, b.room}, .gaps = {c.at, 0, c.room}};
}

/* --- the loader ------------------------------------------------------------------------------------------------- */

static ns_t byte_ns(void) {
    static long rate;
    static ns_t cached;
    long baud = set.baud;
    if (set.unpaced) return 0;
    if (!baud) {
        /* struct termios2 of the kernel: the rate at which the host opened its end, any number. */
        uint32_t block[11];
        baud = ioctl(master, 0x802C542A, block) == 0 && block[10] ? (long)block[10] : 38400;
    }
    if (baud != rate) {
        rate = baud;
        cached = (ns_t)BITS_PER_BYTE * 1000000000 / baud;
    }
    return cached;
}

/* Send `count` bytes; the first bit goes out at `from`, but not before the bytes that are being sent. */
static void answer(const uint8_t *bytes, size_t count, ns_t from) {
    ns_t each = byte_ns(), at = from > tx_free ? from : tx_free;
    for (size_t i = 0; i < count; i++) {
        unsigned slot = (tx.head + tx.count) % TX_RING;
        if (tx.count == TX_RING) fail("an answer does not fit");
        at += each;
        tx.due[slot] = at;
        tx.byte[slot] = bytes[i];
        tx.last[slot] = i + 1 == count;
        tx.count++;
    }
    tx_free = at;
    if (at > busy_until) busy_until = at;
    report.answers++;
    report.wire += each * (ns_t)count;
}

static void answer_one(uint8_t byte, ns_t from) {
    report.nacks += byte == NACK;
    answer(&byte, 1, from);
}

static uint8_t xor_of(const uint8_t *bytes, size_t count) {
    uint8_t sum = 0;
    while (count--) sum ^= *bytes++;
    return sum;
}

static bool readable(uint32_t from, size_t count) {
    uint64_t end = (uint64_t)from + count;
    return (from >= 0x08000000 && end <= 0x08000000 + (uint64_t)flash_bytes) || (from >= RAM_BASE && end <= RAM_BASE + RAM_BYTES) ||
           (from >= part->extra_from && end <= part->extra_to);
}

static uint8_t read_byte(uint32_t at) {
    if (at >= 0x08000000 && at < 0x08000000 + flash_bytes) return flash_memory[at - 0x08000000];
    if (at >= RAM_BASE && at < RAM_BASE + RAM_BYTES) return ram[at - RAM_BASE];
    if (at == part->size_at) return (uint8_t)part->flash_kib;
    if (at == part->size_at + 1) return (uint8_t)(part->flash_kib >> 8);
    if (at >= part->uid_at && at < part->uid_at + 12) return (uint8_t)(0xB0 + at - part->uid_at);
    if (part->loader_id_at && at == part->loader_id_at) return part->loader_id;
    for (size_t i = 0; i < sizeof part->words / sizeof *part->words; i++)
        if (part->words[i].address && at >= part->words[i].address && at < part->words[i].address + 4)
            return (uint8_t)(part->words[i].value >> 8 * (at - part->words[i].address));
    return 0xFF;
}

/* Where sector `number` lies; 0 bytes when there is none. */
static size_t sector(unsigned number, size_t *start) {
    size_t at = 0;
    unsigned n = 0;
    for (size_t r = 0; r < sizeof part->runs / sizeof *part->runs && part->runs[r].kib; r++)
        for (unsigned i = 0; (!part->runs[r].count || i < part->runs[r].count) && at < flash_bytes; i++, n++) {
            if (n == number) {
                *start = at;
                return (size_t)part->runs[r].kib * 1024;
            }
            at += (size_t)part->runs[r].kib * 1024;
        }
    return 0;
}

static void erase_sectors(const uint8_t *list, size_t count, unsigned width, ns_t at) {
    ns_t takes = 0;
    for (size_t i = 0; i < count; i++) {
        unsigned number = width == 1 ? list[i] : (unsigned)(list[2 * i] << 8 | list[2 * i + 1]);
        size_t start = 0, size = sector(number, &start);
        memset(flash_memory + start, 0xFF, size);
        takes += (ns_t)(set.erase_ms * 1e6);
    }
    report.erased += takes;
    answer_one(ACK, at + takes);
}

static void erase_all(ns_t at) {
    ns_t takes = (ns_t)(set.erase_ms * 1e6);
    memset(flash_memory, 0xFF, flash_bytes);
    report.erased += takes;
    answer_one(ACK, at + takes);
}

static void expect(enum state next, size_t count) {
    state = next;
    have = 0;
    need = count;
}

static void done(uint8_t byte, ns_t at) {
    answer_one(byte, at);
    state = OPCODE;
}

static void start_command(ns_t at) {
    const uint8_t commands[] = {GET, GET_VERSION, GET_ID, READ, GO, WRITE, (uint8_t)part->erase_opcode, 0x63, 0x73, 0x82, 0x92};
    uint8_t reply[32] = {ACK};
    switch (opcode) {
    case GET:
        reply[1] = sizeof commands;
        reply[2] = (uint8_t)part->loader;
        memcpy(reply + 3, commands, sizeof commands);
        reply[3 + sizeof commands] = ACK;
        answer(reply, 4 + sizeof commands, at);
        state = OPCODE;
        return;
    case GET_VERSION:
        memcpy(reply + 1, (const uint8_t[]){(uint8_t)part->loader, 0, 0, ACK}, 4);
        answer(reply, 5, at);
        state = OPCODE;
        return;
    case GET_ID:
        memcpy(reply + 1, (const uint8_t[]){1, (uint8_t)(part->pid >> 8), (uint8_t)part->pid, ACK}, 4);
        answer(reply, 5, at);
        state = OPCODE;
        return;
    case READ:
    case WRITE:
    case GO:
        answer_one(ACK, at);
        expect(ADDRESS, 5);
        return;
    case ERASE:
    case EXT_ERASE:
        if (opcode != part->erase_opcode) break;
        answer_one(ACK, at);
        if (opcode == ERASE)
            expect(ERASE_COUNT, 1);
        else
            expect(EXT_COUNT, 2);
        return;
    }
    done(NACK, at);
}

static void take_address(ns_t at) {
    address = (uint32_t)field[0] << 24 | (uint32_t)field[1] << 16 | (uint32_t)field[2] << 8 | field[3];
    bool flash_or_ram = (address >= 0x08000000 && address < 0x08000000 + flash_bytes) ||
                        (address >= RAM_BASE && address < RAM_BASE + RAM_BYTES);
    if (xor_of(field, 5) || !(opcode == READ ? readable(address, 1) : flash_or_ram)) {
        done(NACK, at);
        return;
    }
    answer_one(ACK, at);
    if (opcode == GO)
        state = APPLICATION;
    else if (opcode == READ)
        expect(READ_LENGTH, 2);
    else
        expect(WRITE_DATA, 1);
}

static void program(ns_t at) {
    size_t count = (size_t)field[0] + 1;
    ns_t takes = 0;
    if (xor_of(field, count + 2)) {
        done(NACK, at);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        uint64_t where = (uint64_t)address + i;
        if (where >= 0x08000000 && where < 0x08000000 + (uint64_t)flash_bytes) {
            flash_memory[where - 0x08000000] &= field[1 + i];
            if (i % 4 == 0) takes += (ns_t)(set.program_us_per_word * 1e3);
        } else if (where >= RAM_BASE && where < RAM_BASE + RAM_BYTES)
            ram[where - RAM_BASE] = field[1 + i];
    }
    report.programmed += takes;
    done(ACK, at + takes);
}

/* The loader reads one byte. `at`: when it was complete, or when the loader came back to its USART. */
static void loader_reads(uint8_t byte, ns_t at) {
    if (state == UNSYNCED) {
        if (byte == SYNC) {
            answer_one(ACK, at);
            state = OPCODE;
            report.syncs++;
        } else
            report.ignored++;
        return;
    }
    if (state == APPLICATION) {
        report.ignored++;
        return;
    }
    if (state == OPCODE) {
        opcode = byte;
        state = COMPLEMENT;
        return;
    }
    if (state == COMPLEMENT) {
        if ((byte ^ opcode) == 0xFF)
            start_command(at);
        else
            done(NACK, at);
        return;
    }
    field[have++] = byte;
    if (state == WRITE_DATA && have == 1) need = (size_t)byte + 3;
    if (have < need) return;
    switch (state) {
    case ADDRESS:
        take_address(at);
        break;
    case READ_LENGTH:
        if ((field[0] ^ field[1]) != 0xFF || !readable(address, (size_t)field[0] + 1))
            done(NACK, at);
        else {
            uint8_t reply[257] = {ACK};
            size_t count = (size_t)field[0] + 1;
            for (size_t i = 0; i < count; i++) reply[1 + i] = read_byte(address + (uint32_t)i);
            answer(reply, count + 1, at);
            state = OPCODE;
        }
        break;
    case WRITE_DATA:
        program(at);
        break;
    case ERASE_COUNT:
        state = ERASE_LIST;
        need = field[0] == 0xFF ? 2 : (size_t)field[0] + 3;
        break;
    case ERASE_LIST:
        if (field[0] == 0xFF && field[1] == 0x00) {
            erase_all(at);
            state = OPCODE;
        } else if (xor_of(field, have))
            done(NACK, at);
        else {
            erase_sectors(field + 1, (size_t)field[0] + 1, 1, at);
            state = OPCODE;
        }
        break;
    case EXT_COUNT:
        state = EXT_LIST;
        need = field[0] == 0xFF ? 3 : 2 * ((size_t)(field[0] << 8 | field[1]) + 1) + 3;
        break;
    case EXT_LIST:
        if (xor_of(field, have))
            done(NACK, at);
        else if (field[0] == 0xFF) {
            erase_all(at);
            state = OPCODE;
        } else {
            erase_sectors(field + 2, (have - 3) / 2, 2, at);
            state = OPCODE;
        }
        break;
    default:
        break;
    }
}

/* The loader comes back to its USART and finds the byte that waited in the register. */
static void look_at_register(ns_t at) {
    if (register_full && busy_until <= at) {
        register_full = false;
        loader_reads(register_byte, busy_until);
    }
}

/* A byte was complete on the wire at `at`. */
static void receive(uint8_t byte, ns_t at) {
    look_at_register(at);
    if (!pins.nrst || !pins.power || at < deaf_until) {
        report.ignored++;
        return;
    }
    if (busy_until > at) {
        if (register_full) {
            report.overruns++;
            return;
        }
        register_full = true;
        register_byte = byte;
        return;
    }
    if (!report.first_sync && state == UNSYNCED && byte == SYNC) report.first_sync = at - byte_ns();
    loader_reads(byte, at);
}

/* --- the wire --------------------------------------------------------------------------------------------------- */

static void from_host(void) {
    static uint8_t buffer[65536];
    ssize_t count = read(master, buffer, sizeof buffer);
    ns_t at = now_ns(), each = byte_ns();
    if (count <= 0) return;
    if (silent_from) {
        report.resets_took += at - silent_from;
        silent_from = 0;
    } else if (answered_at) {
        ns_t gap = at - answered_at;
        keep(&report.gaps, gap);
        if (gap > set.gap_us * 1000) report.gaps_over += gap - set.gap_us * 1000;
    } else if (report.first_sync && rx_free && at > rx_free)
        report.in_frames += at - rx_free;
    answered_at = 0;
    if (rx_free > at) at = rx_free;
    report.bytes_in += (uint64_t)count;
    report.wire += each * count;
    for (ssize_t i = 0; i < count; i++) {
        at += each;
        receive(buffer[i], at);
    }
    rx_free = at;
}

/* Hand over what is due. True when something is left. */
static bool to_host(void) {
    uint8_t piece[TX_RING];
    size_t count = 0;
    ns_t at = now_ns();
    unsigned first = tx.head;
    while (tx.count && tx.due[tx.head] <= at) {
        piece[count++] = tx.byte[tx.head];
        tx.head = (tx.head + 1) % TX_RING;
        tx.count--;
    }
    if (count) {
        if (write(master, piece, count) != (ssize_t)count) fail("the host does not read: %s", strerror(errno));
        at = now_ns();
        for (size_t i = 0; i < count; i++) {
            unsigned slot = (unsigned)(first + i) % TX_RING;
            ns_t late = at - tx.due[slot];
            keep(&report.late_all, late);
            if (tx.last[slot]) {
                keep(&report.late_last, late);
                answered_at = at;
            }
        }
        report.bytes_out += count;
        report.last_byte = at;
    }
    return tx.count > 0;
}

/* Until the next byte is due, or somebody says something. A last byte is met exactly, see above. */
static bool wait_for(struct pollfd *watched, unsigned count, bool sending) {
    struct timespec left, *limit = NULL;
    if (!sending && register_full) {
        ns_t span = busy_until - now_ns();
        left = (struct timespec){span > 0 ? span / 1000000000 : 0, span > 0 ? span % 1000000000 : 0};
        limit = &left;
    }
    if (sending) {
        ns_t due = tx.due[tx.head], span = due - now_ns();
        if (tx.last[tx.head]) span -= set.spin_us * 1000;
        if (span <= 0) {
            while (now_ns() < due) {
            }
            span = 0;
        }
        left = (struct timespec){span / 1000000000, span % 1000000000};
        limit = &left;
    }
    return ppoll(watched, count, limit, NULL) > 0;
}

/* --- the lines -------------------------------------------------------------------------------------------------- */

static void move(const char *name, bool level) {
    bool was_running = pins.nrst && pins.power;
    if (!strcmp(name, "nrst")) pins.nrst = level;
    if (!strcmp(name, "boot0")) pins.boot0 = level;
    if (!strcmp(name, "power")) pins.power = level;
    bool running = pins.nrst && pins.power;
    if (running == was_running) return;
    /* Either edge ends what was going on; what is still on its way to the host is lost with it. */
    if (report.first_sync && !silent_from) silent_from = report.last_byte > rx_free ? report.last_byte : rx_free;
    tx.count = 0;
    tx_free = rx_free = busy_until = 0;
    register_full = false;
    answered_at = 0;
    state = running && pins.boot0 ? UNSYNCED : APPLICATION;
    if (running) {
        deaf_until = now_ns() + (ns_t)(set.startup_ms * 1e6);
        report.resets++;
    }
}

static void command(struct connection *c) {
    char name[16];
    int level;
    const char *reply = "ok\n";
    if (sscanf(c->line, "%15s %d", name, &level) == 2 && (level == 0 || level == 1) &&
        (!strcmp(name, "nrst") || !strcmp(name, "boot0") || !strcmp(name, "power")))
        move(name, level);
    else
        reply = "error expected nrst|boot0|power 0|1\n";
    if (write(c->fd, reply, strlen(reply)) < 0) return; /* It is gone; its end is read next. */
}

static void from_box(struct connection *c) {
    ssize_t count = read(c->fd, c->line + c->used, sizeof c->line - 1 - c->used);
    if (count <= 0) {
        close(c->fd);
        c->fd = -1;
        for (int i = 0; i < CONNECTIONS; i++)
            if (connections[i].fd >= 0) return;
        move("boot0", false);
        move("nrst", true);
        move("power", true);
        return;
    }
    c->used += (size_t)count;
    for (char *end; (end = memchr(c->line, '\n', c->used));) {
        size_t length = (size_t)(end - c->line) + 1;
        *end = 0;
        command(c);
        memmove(c->line, c->line + length, c->used - length);
        c->used -= length;
    }
    if (c->used == sizeof c->line - 1) c->used = 0;
}

static void accept_box(void) {
    int fd = accept4(server, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    for (int i = 0; i < CONNECTIONS; i++)
        if (connections[i].fd < 0) {
            connections[i] = (struct connection){.fd = fd};
            return;
        }
    close(fd);
}

/* --- life ------------------------------------------------------------------------------------------------------- */

static void on_signal(int number) {
    if (number == SIGUSR1)
        want_report = 1;
    else
        want_end = 1;
}

static void loop(void) {
    while (!want_end) {
        struct pollfd watched[2 + CONNECTIONS] = {{master, POLLIN, 0}, {server, POLLIN, 0}};
        unsigned count = 2;
        if (want_report) {
            want_report = 0;
            write_report();
        }
        look_at_register(now_ns());
        bool sending = to_host();
        for (int i = 0; i < CONNECTIONS; i++)
            if (connections[i].fd >= 0) watched[count++] = (struct pollfd){connections[i].fd, POLLIN, 0};
        if (!wait_for(watched, count, sending)) continue;
        /* Lines first: what the host wrote after a reset belongs to the part that came out of it. */
        for (unsigned w = 2; w < count; w++)
            if (watched[w].revents)
                for (int i = 0; i < CONNECTIONS; i++)
                    if (connections[i].fd == watched[w].fd) {
                        from_box(&connections[i]);
                        break;
                    }
        if (watched[1].revents) accept_box();
        if (watched[0].revents & POLLIN) from_host();
    }
    write_report();
}

static void open_pty(void) {
    struct termios raw;
    char name[128];
    if (openpty(&master, &slave, name, NULL, NULL)) fail("no pty: %s", strerror(errno));
    /* The slave stays open here: without any open slave the master would read EIO between two hosts. */
    tcgetattr(slave, &raw);
    cfmakeraw(&raw);
    tcsetattr(slave, TCSANOW, &raw);
    fcntl(master, F_SETFL, O_NONBLOCK);
    if (set.link) {
        unlink(set.link);
        if (symlink(name, set.link)) fail("cannot make %s: %s", set.link, strerror(errno));
    }
    printf("%s\n", name);
    fflush(stdout);
}

static void open_lines(void) {
    struct sockaddr_un where = {.sun_family = AF_UNIX};
    for (int i = 0; i < CONNECTIONS; i++) connections[i].fd = -1;
    if (!set.lines) return;
    if (strlen(set.lines) >= sizeof where.sun_path) fail("the path %s is too long", set.lines);
    strcpy(where.sun_path, set.lines);
    unlink(set.lines);
    server = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (server < 0 || bind(server, (struct sockaddr *)&where, sizeof where) || listen(server, CONNECTIONS))
        fail("cannot listen on %s: %s", set.lines, strerror(errno));
}

static void become_punctual(void) {
    struct sched_param parameters = {.sched_priority = 20};
    prctl(PR_SET_TIMERSLACK, 1UL);
    if (set.realtime && sched_setscheduler(0, SCHED_FIFO, &parameters)) set.realtime = false;
    if (mlockall(MCL_CURRENT | MCL_FUTURE)) return; /* Not allowed: then a page fault may cost a moment, and it is counted. */
}

static void usage(void) {
    fprintf(stderr,
            "usage: device [--part F103|F407|F756|L476] [--link PATH] [--lines PATH] [--report FILE]\n"
            "  --baud N            pace at N whatever the host sets (default: what the host sets)\n"
            "  --unpaced           bytes take no time\n"
            "  --program-us X      programming of 4 bytes (16)\n"
            "  --erase-ms X        erase of one sector, or of everything by one command (0)\n"
            "  --startup-ms X      from the release of NRST to the listening loader (10)\n"
            "  --spin-us N         how long the clock is watched before the last byte of an answer (60)\n"
            "  --gap-us N          of a longer wait for the host, what lies beyond counts as a stall (1000)\n"
            "  --no-realtime       normal priority\n"
            "  --flash-out FILE N  write the first N bytes of flash with each report\n"
            "The name of the pty is the first line of its output.\n");
    exit(2);
}

static void read_options(int argc, char **argv) {
    const char *name = "F407";
    for (int i = 1; i < argc; i++) {
        const char *o = argv[i];
        if (!strcmp(o, "--unpaced")) {
            set.unpaced = true;
            continue;
        }
        if (!strcmp(o, "--no-realtime")) {
            set.realtime = false;
            continue;
        }
        if (i + 1 >= argc) usage();
        const char *v = argv[++i];
        if (!strcmp(o, "--part")) name = v;
        else if (!strcmp(o, "--link")) set.link = v;
        else if (!strcmp(o, "--lines")) set.lines = v;
        else if (!strcmp(o, "--report")) set.report = v;
        else if (!strcmp(o, "--baud")) set.baud = atol(v);
        else if (!strcmp(o, "--program-us")) set.program_us_per_word = atof(v);
        else if (!strcmp(o, "--erase-ms")) set.erase_ms = atof(v);
        else if (!strcmp(o, "--startup-ms")) set.startup_ms = atof(v);
        else if (!strcmp(o, "--spin-us")) set.spin_us = atol(v);
        else if (!strcmp(o, "--gap-us")) set.gap_us = atol(v);
        else if (!strcmp(o, "--flash-out") && i + 1 < argc) {
            set.flash_out = v;
            set.flash_out_bytes = (unsigned)atol(argv[++i]);
        } else usage();
    }
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strcmp(parts[i].name, name)) part = &parts[i];
    if (!part) usage();
}

int main(int argc, char **argv) {
    struct sigaction action = {.sa_handler = on_signal}; /* Without SA_RESTART: a signal ends the wait. */
    read_options(argc, argv);
    flash_bytes = (size_t)part->flash_kib * 1024;
    flash_memory = malloc(flash_bytes);
    if (!flash_memory) fail("no memory for the flash");
    memset(flash_memory, 0xFF, flash_bytes);
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    open_lines();
    open_pty();
    become_punctual();
    loop();
    if (set.link) unlink(set.link);
    if (set.lines) unlink(set.lines);
    return 0;
}
