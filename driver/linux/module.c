// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/* Load and unload, parameters, log. */

#include <linux/bug.h>
#include <linux/cpu.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/printk.h>
#include <linux/ratelimit.h>
#include <linux/sysfs.h>
#include <linux/string.h>

#include "haxm.h"

/* Levels as the log crate counts them. */
enum { LOG_OFF, LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG, LOG_TRACE };

static unsigned int haxm_log_level = LOG_INFO;

/* A guest or its owner can cause messages: at most 200 in 5 seconds get out. */
static DEFINE_RATELIMIT_STATE(haxm_log_limit, 5 * HZ, 200);

void haxm_os_log(u32 level, const u8 *text, size_t length)
{
	int size = min_t(size_t, length, 1000);

	if (level > LOG_ERROR && !__ratelimit(&haxm_log_limit))
		return;
	switch (level) {
	case LOG_ERROR:
		printk(KERN_ERR "haxm: %.*s\n", size, text);
		break;
	case LOG_WARN:
		printk(KERN_WARNING "haxm: %.*s\n", size, text);
		break;
	case LOG_INFO:
		printk(KERN_INFO "haxm: %.*s\n", size, text);
		break;
	default:
		printk(KERN_DEBUG "haxm: %.*s\n", size, text);
	}
}

static char *haxm_mitigations = "auto";
module_param_named(mitigations, haxm_mitigations, charp, 0444);
MODULE_PARM_DESC(mitigations, "against speculation: off, auto (what the processor needs, unless the kernel runs with mitigations=off; default), full");

u32 haxm_os_mitigations(void)
{
	if (sysfs_streq(haxm_mitigations, "off"))
		return 0;
	if (sysfs_streq(haxm_mitigations, "full"))
		return 2;
	return !cpu_mitigations_off();
}

void haxm_os_panic(const u8 *text, size_t length)
{
	pr_emerg("haxm: %.*s\n", (int)min_t(size_t, length, 1000), text);
	BUG();
}

static int haxm_set_log_level(const char *text, const struct kernel_param *param)
{
	int err = param_set_uint_minmax(text, param, LOG_OFF, LOG_TRACE);

	if (!err)
		haxm_core_set_log_level(haxm_log_level);
	return err;
}

static const struct kernel_param_ops haxm_log_level_ops = {
	.set = haxm_set_log_level,
	.get = param_get_uint,
};
module_param_cb(log_level, &haxm_log_level_ops, &haxm_log_level, 0644);
MODULE_PARM_DESC(log_level, "0 off, 1 errors, 2 warnings, 3 information (default), 4 debug, 5 trace");

static int haxm_get_memory(char *text, const struct kernel_param *param)
{
	return sysfs_emit(text, "%llu %llu\n", haxm_core_pages(), haxm_core_bytes());
}

static const struct kernel_param_ops haxm_memory_ops = {
	.get = haxm_get_memory,
};
module_param_cb(memory, &haxm_memory_ops, NULL, 0444);
MODULE_PARM_DESC(memory, "kernel memory in use, to be read: pages, and bytes besides");

static int __init haxm_load(void)
{
	int err;

	haxm_core_set_log_level(haxm_log_level);
	err = haxm_devices_init();
	if (err)
		return err;
	err = haxm_cpu_init();
	if (err)
		goto no_cpus;
	haxm_signal_init();
	/* Makes /dev/HAX, which can be opened from then on: nothing may fail after. */
	err = haxm_core_load();
	if (err)
		goto no_core;
	return 0;

no_core:
	haxm_signal_exit();
	haxm_cpu_exit();
no_cpus:
	haxm_devices_exit();
	return err;
}

/* An open node holds the module (fops.owner), so nothing is open here. */
static void __exit haxm_unload(void)
{
	haxm_signal_exit();
	haxm_cpu_exit();
	haxm_core_unload();
	haxm_devices_exit();
}

module_init(haxm_load);
module_exit(haxm_unload);

MODULE_DESCRIPTION("Hypervisor for Intel VT-x with the interface of Intel HAXM");
MODULE_AUTHOR("the haxm-rs authors");
MODULE_VERSION(HAXM_VERSION);
MODULE_LICENSE("Dual BSD/GPL");
