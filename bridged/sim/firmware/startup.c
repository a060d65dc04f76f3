/*
 * From reset to main: the vector table and the reset handler of a Cortex-M4 or M7 (ARMv7-M).
 *
 * The table is at the start of flash, where VTOR points after reset. No interrupt is enabled, so the sixteen entries of the
 * core are all there is; every fault ends in a loop where a debugger finds it.
 */
#include <stdint.h>

/* From the linker script. Only their addresses mean something. */
extern uint32_t stack_top[], data_start[], data_end[], data_load[], bss_start[], bss_end[];

int main(void);

__attribute__((noreturn)) void reset_handler(void)
{
    /* volatile: the compiler must not turn the loops into memcpy and memset, which do not exist here. */
    volatile uint32_t *to = data_start;
    for (const uint32_t *from = data_load; to < data_end;)
        *to++ = *from++;
    for (to = bss_start; to < bss_end;)
        *to++ = 0;
    main();
    for (;;) {
    }
}

static void fault_handler(void)
{
    for (;;) {
    }
}

typedef void (*vector)(void);

__attribute__((used, section(".vectors"))) static const vector vectors[16] = {
    (vector)stack_top, /* 0: initial stack pointer */
    reset_handler,     /* 1: reset */
    fault_handler,     /* 2: NMI */
    fault_handler,     /* 3: HardFault */
    fault_handler,     /* 4: MemManage */
    fault_handler,     /* 5: BusFault */
    fault_handler,     /* 6: UsageFault */
    0, 0, 0, 0,        /* 7..10: reserved */
    fault_handler,     /* 11: SVCall */
    fault_handler,     /* 12: DebugMonitor */
    0,                 /* 13: reserved */
    fault_handler,     /* 14: PendSV */
    fault_handler,     /* 15: SysTick */
};
