/*
 * The application of the demo: says who it is on its USART (115200 8N1), then answers every line with "ok <line>".
 *
 * It stands for a customer's firmware: an ordinary bare-metal ELF with a vector table, initialised data, constants and a
 * blank stretch, large enough to fill several flash sectors. No library, no interrupts, no heap.
 *
 * A simulator cannot run it, so the image carries a descriptor: the bytes "BRIDGED-APP1", a zero, then the banner with a
 * closing zero. The simulated application prints what it finds there, in the flash it really has; the code below prints
 * the very same bytes. The version thus exists once.
 */
#include <stdint.h>

#include "board.h"

#define VERSION "1.0.0"
#define BAUD 115200u
#define MAGIC "BRIDGED-APP1"
#define LINE_LIMIT 96u

#define REGISTER(address) (*(volatile uint32_t *)(address))

/* The USART of L4, F7 and H7 is the same block ("version 2"). */
#define USART_CR1 REGISTER(USART_BASE + 0x00u)
#define USART_BRR REGISTER(USART_BASE + 0x0Cu)
#define USART_ISR REGISTER(USART_BASE + 0x1Cu)
#define USART_ICR REGISTER(USART_BASE + 0x20u)
#define USART_RDR REGISTER(USART_BASE + 0x24u)
#define USART_TDR REGISTER(USART_BASE + 0x28u)
#define CR1_UE (1u << 0)
#define CR1_RE (1u << 2)
#define CR1_TE (1u << 3)
#define ISR_ORE (1u << 3)
#define ISR_RXNE (1u << 5)
#define ISR_TXE (1u << 7)

#define GPIO_MODER REGISTER(GPIO_BASE + 0x00u)
#define GPIO_AFR(pin) REGISTER(GPIO_BASE + 0x20u + 4u * ((pin) / 8u))

__attribute__((used, section(".descriptor"))) static const char descriptor[] =
    MAGIC "\0" "hello from bridged demo on " BOARD_NAME ", version " VERSION;
static const char *const banner = descriptor + sizeof MAGIC;

/* Content that does not compress to nothing, so that every sector has something to prove; made by the build script. */
__attribute__((used, section(".ballast"))) static const uint8_t ballast[BALLAST_BYTES] = {
#embed "ballast.bin"
};

/* A stretch that equals erased flash: a good plan never sends it, and the proof covers it all the same. */
__attribute__((used, section(".ballast.blank"))) static const uint8_t blank[BLANK_BYTES] = {[0 ... BLANK_BYTES - 1] = 0xFF};

/* Not constant on purpose: it reaches RAM only when the reset handler copied .data. */
__attribute__((used)) static char answer[] = "ok ";
/* Zero only when the reset handler cleared .bss. */
static uint32_t line_length;
static char line[LINE_LIMIT];

static void pin_to_usart(uint32_t pin)
{
    GPIO_AFR(pin) = (GPIO_AFR(pin) & ~(0xFu << (4u * (pin % 8u)))) | (PIN_FUNCTION << (4u * (pin % 8u)));
    GPIO_MODER = (GPIO_MODER & ~(3u << (2u * pin))) | (2u << (2u * pin));
}

static void usart_start(void)
{
    REGISTER(GPIO_CLOCK_ENABLE) |= 1u << GPIO_CLOCK_BIT;
    REGISTER(USART_CLOCK_ENABLE) |= 1u << USART_CLOCK_BIT;
    /* The block is reachable two bus cycles after its clock is on; a read back of the register takes longer. */
    (void)REGISTER(USART_CLOCK_ENABLE);
    /* The rate first, the pins last: TX is never driven low, and the host sees no false start bit. */
    USART_BRR = (CLOCK_HZ + BAUD / 2u) / BAUD;
    USART_CR1 = CR1_UE | CR1_RE | CR1_TE;
    pin_to_usart(PIN_TX);
    pin_to_usart(PIN_RX);
}

static void put(char c)
{
    while (!(USART_ISR & ISR_TXE)) {
    }
    USART_TDR = (uint8_t)c;
}

static void print(const char *text)
{
    while (*text)
        put(*text++);
}

static char take(void)
{
    for (;;) {
        uint32_t status = USART_ISR;
        if (status & ISR_ORE)
            USART_ICR = ISR_ORE;
        if (status & ISR_RXNE)
            return (char)USART_RDR;
    }
}

int main(void)
{
    usart_start();
    print(banner);
    print("\r\n");
    for (;;) {
        char c = take();
        if (c == '\n') {
            line[line_length] = 0;
            line_length = 0;
            print(answer);
            print(line);
            print("\r\n");
        } else if (c != '\r' && line_length < LINE_LIMIT - 1u) {
            line[line_length++] = c;
        }
    }
}
