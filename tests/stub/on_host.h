/* What bridged/stub/stub.c needs of a machine, over the memory of a PC: see host.c. */
#include <stdlib.h>
#include <string.h>

extern struct context context;

uint8_t *memory_at(uint32_t address);
uint32_t get(uint32_t address);
void put(uint32_t address, uint32_t value);

#define MEMORY(address) memory_at(address)

static inline void store(uint32_t address, uint32_t value, uint32_t width) { memcpy(memory_at(address), &value, width); }
static inline void barrier(void) {}
__attribute__((noreturn)) static inline void jump(uint32_t stack, uint32_t entry)
{
    (void)stack, (void)entry;
    exit(0);
}
