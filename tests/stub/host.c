/* The second-stage loader on a PC, under the sanitizers: host FLASH_FILE < bytes_from_the_host > answers.
 *
 * The source is the shipped one, included. Ring, block and flash are allocated each by itself, so that one byte beyond any of
 * them is an error. The bytes of the input arrive in the ring as fast as they are taken. The flash has no rules here: these are
 * for the emulated controllers. It ends when the input is used up and the loader has waited for a while; then the flash is
 * written to FLASH_FILE.
 */
#define STUB_ON_HOST
#include "../../bridged/stub/stub.c"

#include <stdio.h>

#define RING_BYTES 4096u
#define INLET_BYTES 256u
#define BLOCK_MAX 1028u
#define FLASH_BYTES 16384u
#define TABLE_BYTES 1024u

enum { STATUS_AT = 0x1000, DATA_AT = 0x1004, CR1_AT = 0x1008, BRR_AT = 0x100C, DOG_AT = 0x2000, LEFT_AT = 0x3000, FLASH_AT = 0x4000 };
enum { RING = 0x20000000, BLOCK = 0x20010000, INLET = 0x20020000, TABLE_AT = 0x20030000, FLASH = 0x08000000 };

struct context context;
static uint8_t *inlet, *ring, *block, *flash, *table;
static uint32_t arrived, ticks, idle;
static const char *flash_file;

__attribute__((noreturn)) static void finish(void)
{
    FILE *out = fopen(flash_file, "wb");
    if (!out || fwrite(flash, 1, FLASH_BYTES, out) != FLASH_BYTES || fclose(out))
        abort();
    fflush(stdout);
    /* Freed, so that a leak report says something. */
    free(inlet), free(ring), free(block), free(flash), free(table);
    exit(0);
}

uint8_t *memory_at(uint32_t address)
{
    if (address >= FLASH && address - FLASH < FLASH_BYTES)
        return flash + (address - FLASH);
    if (address >= INLET && address - INLET < INLET_BYTES)
        return inlet + (address - INLET);
    if (address >= RING && address - RING < RING_BYTES)
        return ring + (address - RING);
    if (address >= BLOCK && address - BLOCK < BLOCK_MAX)
        return block + (address - BLOCK);
    if (address >= TABLE_AT && address - TABLE_AT < TABLE_BYTES)
        return table + (address - TABLE_AT);
    finish(); /* READ and CRC may ask for any address; what is not there ends the run */
}

uint32_t get(uint32_t address)
{
    if (address == LEFT_AT) {
        /* Several at a time, so that the inlet is emptied in pieces that end anywhere. */
        for (int n = (int)(ticks >> 3) & 31; n >= 0; n--) {
            int byte = (context.written - context.read) % RING_BYTES < RING_BYTES / 2 ? getchar() : EOF;
            if (byte != EOF) {
                inlet[arrived++ % INLET_BYTES] = (uint8_t)byte;
                idle = 0;
            } else if (feof(stdin) && ++idle > 30000)
                finish();
        }
        return INLET_BYTES - arrived % INLET_BYTES;
    }
    if (address == SYSTICK + 8)
        return (ticks -= 40) & TICKS;
    if (address == STATUS_AT)
        return TRANSMIT_EMPTY | TRANSMIT_COMPLETE;
    if (address == FLASH_AT + 0x10)
        return 0x80;
    return 0;
}

void put(uint32_t address, uint32_t value)
{
    if (address == DATA_AT)
        putchar((int)value);
    if (address == FLASH_AT + 0x10 && value & 0x40) /* start of an erase; the address was written before */
        memset(flash + (context.detail & ~1023u) % FLASH_BYTES, 0xFF, 1024);
    if (address == FLASH_AT + 0x14)
        context.detail = value - FLASH;
    if (address == AIRCR)
        finish();
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    flash_file = argv[1];
    inlet = malloc(INLET_BYTES), ring = malloc(RING_BYTES), block = malloc(BLOCK_MAX), flash = malloc(FLASH_BYTES);
    table = malloc(TABLE_BYTES);
    if (!inlet || !ring || !block || !flash || !table)
        return 2;
    memset(flash, 0, FLASH_BYTES);
    context = (struct context){
        .protocol = PROTOCOL, .ring_mask = RING_BYTES - 1, .block_max = BLOCK_MAX, .brr = 139,
        .usart_status = STATUS_AT, .usart_data = DATA_AT, .usart_cr1 = CR1_AT, .usart_brr = BRR_AT, .watchdog = DOG_AT,
        .inlet = INLET, .inlet_mask = INLET_BYTES - 1, .ring = RING, .remaining = LEFT_AT, .block = BLOCK, .table = TABLE_AT,
        .byte_limit = 40000, .greet_every = 4000000, .confirm_within = 4000000,
        .flash_start = FLASH, .flash_end = FLASH + FLASH_BYTES, .flash_base = FLASH_AT, .bank2_start = ~0u,
        .key_at = 4, .status_at = 0xC, .control_at = 0x10, .clear_at = 0xC, .address_at = 0x14,
        .busy = 1, .errors = 0x14, .clear = 0x34, .lock = 0x80, .program = 1, .erase = 2, .start = 0x40,
        .unit = 2, .width = 2,
    };
    prepare();
    for (;;)
        serve();
}
