/*
 * The three boards of the demo, as data: clocks at reset, the USART and its two pins.
 *
 * Nothing here was run on silicon by this project. Register addresses and bits are from memory of ST's reference manuals
 * (RM0351 for the L476, RM0385 for the F756, RM0433 for the H743) and were checked only in an emulated Cortex-M with a
 * model of the USART; the tests say so too. The pins are among those that the ROM loader of the same chip listens to
 * (AN2606), so one cable serves loader and application.
 *
 * All three run from the oscillator that is on after reset, with every prescaler at 1: the first lines of a new board need
 * no PLL, no flash wait states and no voltage scaling. This holds after a reset only, not after the loader's Go.
 */
#ifndef BOARD_H
#define BOARD_H

#if defined(BOARD_L476)

#define BOARD_NAME "STM32L476"
#define CLOCK_HZ 4000000u               /* MSI, range 6 after reset */
#define GPIO_CLOCK_ENABLE 0x4002104Cu   /* RCC_AHB2ENR */
#define GPIO_CLOCK_BIT 0u               /* GPIOAEN */
#define USART_CLOCK_ENABLE 0x40021058u  /* RCC_APB1ENR1 */
#define USART_CLOCK_BIT 17u             /* USART2EN */
#define GPIO_BASE 0x48000000u           /* GPIOA */
#define PIN_TX 2u                       /* PA2, which the ST-LINK's virtual port of a NUCLEO-L476RG hears as well */
#define PIN_RX 3u                       /* PA3 */
#define USART_BASE 0x40004400u          /* USART2 */
#define BALLAST_BYTES (52u * 1024u)     /* pages of 2 KiB: about thirty of them in all */
#define BLANK_BYTES (6u * 1024u)

#elif defined(BOARD_F756)

#define BOARD_NAME "STM32F756"
#define CLOCK_HZ 16000000u              /* HSI */
#define GPIO_CLOCK_ENABLE 0x40023830u   /* RCC_AHB1ENR */
#define GPIO_CLOCK_BIT 2u               /* GPIOCEN */
#define USART_CLOCK_ENABLE 0x40023840u  /* RCC_APB1ENR */
#define USART_CLOCK_BIT 18u             /* USART3EN */
#define GPIO_BASE 0x40020800u           /* GPIOC */
#define PIN_TX 10u                      /* PC10: PA9/PA10 belong to the USB connector of a NUCLEO-F756ZG */
#define PIN_RX 11u                      /* PC11 */
#define USART_BASE 0x40004800u          /* USART3 */
#define BALLAST_BYTES (90u * 1024u)     /* the four sectors of 32 KiB and a part of the one of 128 KiB */
#define BLANK_BYTES (46u * 1024u)

#elif defined(BOARD_H743)

#define BOARD_NAME "STM32H743"
#define CLOCK_HZ 64000000u              /* HSI, not divided */
#define GPIO_CLOCK_ENABLE 0x580244E0u   /* RCC_AHB4ENR */
#define GPIO_CLOCK_BIT 1u               /* GPIOBEN */
#define USART_CLOCK_ENABLE 0x580244E8u  /* RCC_APB1LENR */
#define USART_CLOCK_BIT 18u             /* USART3EN */
#define GPIO_BASE 0x58020400u           /* GPIOB */
#define PIN_TX 10u                      /* PB10 */
#define PIN_RX 11u                      /* PB11 */
#define USART_BASE 0x40004800u          /* USART3 */
#define BALLAST_BYTES (70u * 1024u)     /* two sectors of 128 KiB */
#define BLANK_BYTES (64u * 1024u)

#else
#error "define one of BOARD_L476, BOARD_F756, BOARD_H743"
#endif

#define PIN_FUNCTION 7u /* AF7 is the USART on all of these pins */

#endif
