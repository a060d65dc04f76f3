/* The context block: what the host tells the second-stage loader, and what the loader knows of itself.
 *
 * It lies at the address that is given to Go; the code follows CODE_OFFSET bytes later. The host writes it whole, so the loader
 * needs no data section, no zeroing and no relocation: everything is found relative to the program counter. All fields are
 * 32-bit words. bridged/stub/__init__.py packs the first part by these names and in this order; a test compares both.
 *
 * The loader holds no table of chips. Which registers, bits and widths a part has are facts of the host's chip table: a new
 * part is a row there and never a new binary.
 */
#ifndef STUB_H
#define STUB_H

#include <stdint.h>

#define CODE_OFFSET 0x2A0
#define PROTOCOL 1
#define POKES 32

struct poke {
    uint32_t address; /* bit 0 set: wait until (register & keep) == set, and write nothing */
    uint32_t keep;
    uint32_t set; /* otherwise register = (register & keep) | set */
};

struct context {
    /* --- what Go loads (AN3155, Go command) */
    uint32_t stack;
    uint32_t entry;

    /* --- the greeting, and the answer to HELLO, are the words from here ... */
    uint32_t protocol;
    uint32_t build[2]; /* the first 8 bytes of the SHA-256 of the code: whose answer this is */
    uint32_t ring_mask; /* size of the ring - 1; a power of two: what the host may have under way */
    uint32_t block_max; /* longest payload of a frame */
    uint32_t train; /* CPU cycles of 256 bits of the host's 0x55 train; 0: none was heard */
    uint32_t brr;
    uint32_t cpuid;
    uint32_t ccr; /* bit 16: the data cache is on, and what the DMA wrote may not be what is read */
    /* ... to here */

    /* --- state: the host writes zeros; NAK sends the words from here ... */
    uint32_t expected;
    uint32_t reason;
    uint32_t where;
    uint32_t detail;
    /* ... to here, and STATUS these, too ... */
    uint32_t stopped; /* by ABORT: sequenced verbs are refused until the next HELLO */
    uint32_t frames;
    uint32_t bad_frames;
    uint32_t bad_headers;
    uint32_t gaps;
    uint32_t pauses;
    /* ... to here */
    uint32_t rejected; /* a NAK is out, and no frame came in sequence since */
    uint32_t taken; /* of the inlet: the next byte that is to be moved into the ring */
    uint32_t written; /* of the ring: where that one goes */
    uint32_t read;
    uint32_t crc;
    uint32_t time;
    uint32_t tick;
    uint32_t waiting; /* enum waiting */
    uint32_t since;
    uint32_t old_brr;

    /* --- USART (both register layouts: these are addresses) and the watchdog */
    uint32_t usart_status;
    uint32_t usart_data;
    uint32_t usart_cr1;
    uint32_t usart_brr;
    uint32_t cr1_off;
    uint32_t cr1_on;
    uint32_t watchdog; /* key register of the IWDG; writing it is harmless where the watchdog is off */
    uint32_t rx_input; /* input data register of the port of the RX pin; 0: no train is measured */
    uint32_t rx_mask;

    /* --- memory, and the count that the DMA has left */
    uint32_t inlet; /* what the DMA fills; a power of two, at most 32 KiB, for its counter has 16 bits */
    uint32_t inlet_mask;
    uint32_t ring;
    uint32_t remaining;
    uint32_t block;
    uint32_t table; /* of the CRC: 1,024 bytes */

    /* --- times in CPU cycles */
    uint32_t byte_limit; /* within a frame, at most 2^24 - 1 */
    uint32_t greet_every;
    uint32_t confirm_within;

    /* --- flash controller: offsets, masks and values */
    uint32_t flash_start;
    uint32_t flash_end;
    uint32_t flash_base;
    uint32_t bank2_start; /* first address whose controller registers lie bank2_step higher; 0xFFFFFFFF: none */
    uint32_t bank2_step;
    uint32_t key_at;
    uint32_t status_at;
    uint32_t control_at;
    uint32_t clear_at;
    uint32_t address_at; /* 0: sectors are named in the control register */
    uint32_t busy;
    uint32_t errors;
    uint32_t clear;
    uint32_t lock;
    uint32_t program;
    uint32_t erase;
    uint32_t start;
    uint32_t sector_shift;
    uint32_t unit; /* bytes that are programmed at once (and share an ECC word) */
    uint32_t width; /* bytes of one store: 1, 2 or 4 */
    uint32_t poke_count;
    struct poke pokes[POKES];
};


_Static_assert(sizeof(struct context) <= CODE_OFFSET, "the context must end before the code");

enum verb { HELLO, ERASE, WRITE, FILL, CHECK, CRC, READ, BAUD, STATUS, ABORT, GO, NAK = 0x7F, ANSWER = 0x80 };

enum reason {
    NO_REASON,
    BAD_CRC, /* the frame came with errors */
    BAD_HEADER, /* something that is no header; bytes are skipped until there is one */
    TOO_LONG, /* a good header with a payload beyond block_max */
    OUT_OF_SEQUENCE, /* a frame before it is missing */
    PAUSE, /* the rest of a frame did not come */
    BAD_VERB,
    BAD_ARGUMENT, /* an address outside of the flash, not on its grid, or a length that does not fit */
    STOPPED, /* ABORT was here */
    FLASH_ERROR, /* detail: the error bits of the controller */
    NOT_ERASED, /* after an erase; detail: what is there */
    NOT_BLANK, /* to be programmed, and holds something else: nothing was written there */
    NOT_EQUAL /* programmed without an error, and reads differently; or CHECK found something else */
};

enum waiting { FOR_FRAME, FOR_FIRST_FRAME, FOR_CONFIRMATION };

#endif
