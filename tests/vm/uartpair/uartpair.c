// SPDX-License-Identifier: GPL-2.0
/*
 * uartpair: two cross-wired serial ports, /dev/ttyNM0 and /dev/ttyNM1, for tests of programs that drive a UART.
 *
 * What a pty does not have and this has: the frame format is kept, a frame that the receiver's settings do not fit arrives
 * with a parity or framing error (flag and counter, TIOCGICOUNT), bytes leave at line rate, DTR and RTS are crossed to
 * DSR/DCD and CTS, break is passed on, and a port can be pulled out: it is a platform device, so
 * "echo uartpair.0 > /sys/bus/platform/drivers/uartpair/unbind" does to it what pulling the plug of a USB adapter does.
 *
 * Each end has two files in /sys/class/tty/ttyNM?/:
 *   frame  what this end is set to, as "115200 8E1"
 *   model  1: behind this end sits a model of a UART that keeps its own time. It gets every byte at the moment it is
 *          written and judges it itself (by the sender's "frame"); what it sends is on the wire at once and is judged by
 *          the other end as always.
 *   mini   1: this end has no parity, and its driver drops the setting without an error, as that of the Raspberry Pi's mini
 *          UART does.
 *
 * How a frame is judged: its bits are sampled with the receiver's clock from the edge of the start bit on, as a UART does,
 * with an idle line behind the stop bit. One frame in, one out: two short frames are never heard in one long one.
 */
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/tty.h>
#include <linux/tty_driver.h>
#include <linux/tty_flip.h>
#include <linux/serial.h>
#include <linux/kfifo.h>
#include <linux/hrtimer.h>

#define FIFO_FRAMES 16	/* carried by one tick, as by the FIFO of a UART */

static unsigned int corrupt_every;
module_param(corrupt_every, uint, 0644);
MODULE_PARM_DESC(corrupt_every, "in every Nth frame of either direction one data bit flips; 0: never");

struct end {
	struct tty_port port;
	DECLARE_KFIFO(fifo, unsigned char, 4096);
	spinlock_t lock;
	struct hrtimer timer;
	struct ktermios t;
	struct async_icount ic;
	unsigned int mctrl, sent;
	bool busy, model, mini;
};

static struct end ends[2];
static struct platform_device *devices[2];
static struct tty_driver *driver;

static struct end *peer(struct end *e)
{
	return &ends[e == &ends[0]];
}

static unsigned int baud_of(struct end *e)
{
	return tty_termios_baud_rate(&e->t) ?: 9600;
}

static u64 frame_ns(struct end *e)
{
	return div_u64((u64)tty_get_frame_size(e->t.c_cflag) * NSEC_PER_SEC, baud_of(e));
}

/* --- the wire ---------------------------------------------------------------------------------------------------- */

static unsigned int parity_of(unsigned int value, tcflag_t cflag)
{
	return (hweight8(value) & 1) ^ !!(cflag & PARODD);
}

/* What the receiver makes of one frame: the value, and TTY_NORMAL, TTY_PARITY or TTY_FRAME. */
static char judge(struct end *from, struct end *to, unsigned char *value)
{
	unsigned int data_bits = tty_get_char_size(from->t.c_cflag), heard_bits = tty_get_char_size(to->t.c_cflag);
	u32 levels = ~0u, at = 1, heard = 0;	/* bit n: the level of the line in bit time n; idle is high */
	unsigned int bit, sampled[12];

	levels &= ~1u;				/* the start bit */
	for (bit = 0; bit < data_bits; bit++, at++)
		if (!(*value & (1 << bit)))
			levels &= ~(1u << at);
	if (from->t.c_cflag & PARENB && !parity_of(*value, from->t.c_cflag))
		levels &= ~(1u << at);

	for (bit = 0; bit < heard_bits + 2; bit++) {
		/* the middle of the receiver's bit (after its start bit), in bit times of the sender */
		u64 where = div_u64((u64)(2 * bit + 3) * baud_of(from), 2 * baud_of(to));

		sampled[bit] = where > 31 ? 1 : (levels >> where) & 1;
		if (bit < heard_bits)
			heard |= sampled[bit] << bit;
	}
	*value = heard;
	if (!(to->t.c_cflag & PARENB))
		return sampled[heard_bits] ? TTY_NORMAL : TTY_FRAME;
	if (!sampled[heard_bits + 1])
		return TTY_FRAME;
	return sampled[heard_bits] == parity_of(heard, to->t.c_cflag) ? TTY_NORMAL : TTY_PARITY;
}

/* One frame of e arrives at its peer. */
static void arrive(struct end *e, unsigned char value)
{
	struct end *p = peer(e);
	unsigned char damage = 0;
	char flag = TTY_NORMAL;

	e->ic.tx++;
	if (!tty_port_initialized(&p->port) || !(p->t.c_cflag & CREAD))
		return;
	if (corrupt_every && ++e->sent % corrupt_every == 0)
		damage = 1;
	if (!p->model) {
		flag = judge(e, p, &value);
		if (damage) {
			value ^= damage;
			if (p->t.c_cflag & PARENB && flag == TTY_NORMAL)
				flag = TTY_PARITY;
		}
	} else {
		value ^= damage;
	}
	p->ic.rx++;
	p->ic.parity += flag == TTY_PARITY;
	p->ic.frame += flag == TTY_FRAME;
	if (!tty_insert_flip_char(&p->port, value, flag))
		p->ic.buf_overrun++;
}

static enum hrtimer_restart tick(struct hrtimer *timer)
{
	struct end *e = container_of(timer, struct end, timer);
	unsigned char value;
	unsigned long flags;
	unsigned int left;
	int n;

	spin_lock_irqsave(&e->lock, flags);
	for (n = 0; n < FIFO_FRAMES && kfifo_get(&e->fifo, &value); n++)
		if (!peer(e)->model)
			arrive(e, value);
	left = min_t(unsigned int, FIFO_FRAMES, kfifo_len(&e->fifo));
	e->busy = left;
	spin_unlock_irqrestore(&e->lock, flags);
	tty_flip_buffer_push(&peer(e)->port);
	tty_port_tty_wakeup(&e->port);
	if (!left)
		return HRTIMER_NORESTART;
	hrtimer_forward(timer, hrtimer_get_expires(timer), ns_to_ktime(frame_ns(e) * left));
	return HRTIMER_RESTART;
}

/* --- the tty ------------------------------------------------------------------------------------------------------ */

static int op_write(struct tty_struct *tty, const unsigned char *data, int count)
{
	struct end *e = tty->driver_data;
	unsigned long flags;
	bool start;
	int n;

	spin_lock_irqsave(&e->lock, flags);
	if (e->model) {
		for (n = 0; n < count; n++)
			arrive(e, data[n]);
		spin_unlock_irqrestore(&e->lock, flags);
		tty_flip_buffer_push(&peer(e)->port);
		return count;
	}
	count = kfifo_in(&e->fifo, data, count);
	if (peer(e)->model)
		for (n = 0; n < count; n++)
			arrive(e, data[n]);
	start = count && !e->busy;
	e->busy |= start;
	spin_unlock_irqrestore(&e->lock, flags);
	if (peer(e)->model)
		tty_flip_buffer_push(&peer(e)->port);
	if (start)
		hrtimer_start(&e->timer, ns_to_ktime(frame_ns(e) * min(FIFO_FRAMES, count)), HRTIMER_MODE_REL);
	return count;
}

static unsigned int op_write_room(struct tty_struct *tty)
{
	return kfifo_avail(&((struct end *)tty->driver_data)->fifo);
}

static unsigned int op_chars_in_buffer(struct tty_struct *tty)
{
	return kfifo_len(&((struct end *)tty->driver_data)->fifo);
}

static void op_flush_buffer(struct tty_struct *tty)
{
	struct end *e = tty->driver_data;
	unsigned long flags;

	spin_lock_irqsave(&e->lock, flags);
	kfifo_reset_out(&e->fifo);
	spin_unlock_irqrestore(&e->lock, flags);
	tty_wakeup(tty);
}

static void op_set_termios(struct tty_struct *tty, const struct ktermios *old)
{
	struct end *e = tty->driver_data;

	if (e->mini)
		tty->termios.c_cflag &= ~(PARENB | PARODD);
	e->t = tty->termios;
}

static int op_tiocmget(struct tty_struct *tty)
{
	struct end *e = tty->driver_data;
	unsigned int other = peer(e)->mctrl;

	return e->mctrl | (other & TIOCM_DTR ? TIOCM_DSR | TIOCM_CD : 0) | (other & TIOCM_RTS ? TIOCM_CTS : 0);
}

static int op_tiocmset(struct tty_struct *tty, unsigned int set, unsigned int clear)
{
	struct end *e = tty->driver_data;

	e->mctrl = (e->mctrl | (set & (TIOCM_DTR | TIOCM_RTS))) & ~clear;
	return 0;
}

static int op_break_ctl(struct tty_struct *tty, int on)
{
	struct end *p = peer(tty->driver_data);

	if (on && tty_port_initialized(&p->port)) {
		p->ic.brk++;
		tty_insert_flip_char(&p->port, 0, TTY_BREAK);
		tty_flip_buffer_push(&p->port);
	}
	return 0;
}

static int op_get_icount(struct tty_struct *tty, struct serial_icounter_struct *out)
{
	struct async_icount *ic = &((struct end *)tty->driver_data)->ic;

	out->rx = ic->rx;
	out->tx = ic->tx;
	out->frame = ic->frame;
	out->parity = ic->parity;
	out->brk = ic->brk;
	out->overrun = ic->overrun;
	out->buf_overrun = ic->buf_overrun;
	return 0;
}

static int op_install(struct tty_driver *d, struct tty_struct *tty)
{
	struct end *e = &ends[tty->index];
	int error = tty_port_install(&e->port, d, tty);

	tty->driver_data = e;
	if (!error)
		e->t = tty->termios;
	return error;
}

static int op_open(struct tty_struct *tty, struct file *file)
{
	return tty_port_open(tty->port, tty, file);
}

static void op_close(struct tty_struct *tty, struct file *file)
{
	tty_port_close(tty->port, tty, file);
}

static void op_hangup(struct tty_struct *tty)
{
	tty_port_hangup(tty->port);
}

static const struct tty_operations operations = {
	.install = op_install,
	.open = op_open,
	.close = op_close,
	.hangup = op_hangup,
	.write = op_write,
	.write_room = op_write_room,
	.chars_in_buffer = op_chars_in_buffer,
	.flush_buffer = op_flush_buffer,
	.set_termios = op_set_termios,
	.tiocmget = op_tiocmget,
	.tiocmset = op_tiocmset,
	.break_ctl = op_break_ctl,
	.get_icount = op_get_icount,
};

static void port_dtr_rts(struct tty_port *port, int on)
{
	container_of(port, struct end, port)->mctrl = on ? TIOCM_DTR | TIOCM_RTS : 0;
}

static const struct tty_port_operations port_operations = { .dtr_rts = port_dtr_rts };

/* --- a port that can be plugged and pulled ------------------------------------------------------------------------ */

static ssize_t frame_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct end *e = dev_get_drvdata(dev);
	tcflag_t c = e->t.c_cflag;

	return sysfs_emit(buf, "%u %u%c%c\n", baud_of(e), tty_get_char_size(c),
			  c & PARENB ? (c & PARODD ? 'O' : 'E') : 'N', c & CSTOPB ? '2' : '1');
}
static DEVICE_ATTR_RO(frame);

static ssize_t model_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n", ((struct end *)dev_get_drvdata(dev))->model);
}

static ssize_t model_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	int error = kstrtobool(buf, &((struct end *)dev_get_drvdata(dev))->model);

	return error ?: count;
}
static DEVICE_ATTR_RW(model);

static ssize_t mini_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n", ((struct end *)dev_get_drvdata(dev))->mini);
}

static ssize_t mini_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	int error = kstrtobool(buf, &((struct end *)dev_get_drvdata(dev))->mini);

	return error ?: count;
}
static DEVICE_ATTR_RW(mini);

static struct attribute *attributes[] = { &dev_attr_frame.attr, &dev_attr_model.attr, &dev_attr_mini.attr, NULL };
static const struct attribute_group group = { .attrs = attributes };
static const struct attribute_group *groups[] = { &group, NULL };

static int plug(struct platform_device *pdev)
{
	struct end *e = &ends[pdev->id];

	return PTR_ERR_OR_ZERO(tty_port_register_device_attr(&e->port, driver, pdev->id, &pdev->dev, e, groups));
}

static int pull(struct platform_device *pdev)
{
	struct end *e = &ends[pdev->id];
	struct tty_struct *tty = tty_port_tty_get(&e->port);

	if (tty) {
		tty_vhangup(tty);
		tty_kref_put(tty);
	}
	tty_unregister_device(driver, pdev->id);
	hrtimer_cancel(&e->timer);
	e->busy = false;
	kfifo_reset(&e->fifo);
	return 0;
}

static struct platform_driver plugs = { .driver = { .name = "uartpair" }, .probe = plug, .remove = pull };

static int __init uartpair_init(void)
{
	int i, error;

	driver = tty_alloc_driver(2, TTY_DRIVER_REAL_RAW | TTY_DRIVER_DYNAMIC_DEV);
	if (IS_ERR(driver))
		return PTR_ERR(driver);
	driver->driver_name = "uartpair";
	driver->name = "ttyNM";
	driver->type = TTY_DRIVER_TYPE_SERIAL;
	driver->subtype = SERIAL_TYPE_NORMAL;
	driver->init_termios = tty_std_termios;
	driver->init_termios.c_cflag = B9600 | CS8 | CREAD | HUPCL | CLOCAL;
	tty_set_operations(driver, &operations);
	for (i = 0; i < 2; i++) {
		tty_port_init(&ends[i].port);
		ends[i].port.ops = &port_operations;
		ends[i].t = driver->init_termios;
		INIT_KFIFO(ends[i].fifo);
		spin_lock_init(&ends[i].lock);
		hrtimer_init(&ends[i].timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
		ends[i].timer.function = tick;
	}
	error = tty_register_driver(driver);
	if (error)
		goto no_driver;
	error = platform_driver_register(&plugs);
	if (error)
		goto no_plugs;
	for (i = 0; i < 2; i++) {
		devices[i] = platform_device_register_simple("uartpair", i, NULL, 0);
		if (IS_ERR(devices[i])) {
			error = PTR_ERR(devices[i]);
			goto no_devices;
		}
	}
	return 0;

no_devices:
	while (i--)
		platform_device_unregister(devices[i]);
	platform_driver_unregister(&plugs);
no_plugs:
	tty_unregister_driver(driver);
no_driver:
	for (i = 0; i < 2; i++)
		tty_port_destroy(&ends[i].port);
	tty_driver_kref_put(driver);
	return error;
}

static void __exit uartpair_exit(void)
{
	int i;

	for (i = 0; i < 2; i++)
		platform_device_unregister(devices[i]);
	platform_driver_unregister(&plugs);
	tty_unregister_driver(driver);
	for (i = 0; i < 2; i++) {
		hrtimer_cancel(&ends[i].timer);
		tty_port_destroy(&ends[i].port);
	}
	tty_driver_kref_put(driver);
}

module_init(uartpair_init);
module_exit(uartpair_exit);
MODULE_DESCRIPTION("Two cross-wired serial ports that keep the frame format");
MODULE_LICENSE("GPL");
