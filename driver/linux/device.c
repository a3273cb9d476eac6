// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * Device nodes: /dev/HAX, /dev/hax_vm/vmNN, /dev/hax_vmNN/vcpuMM.
 *
 * HAXM made all of them misc devices. The kernel has few dynamic misc minors
 * (128 before 6.2), fewer than 64 VMs of 16 vCPUs, so VMs and vCPUs have a
 * region of character devices of their own here.
 */

#include <linux/cdev.h>
#include <linux/completion.h>
#include <linux/cred.h>
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/refcount.h>
#include <linux/slab.h>
#include <linux/version.h>

#include "haxm.h"

/* Minors: the VMs, then 16 vCPUs of each. */
#define HAXM_MINORS (HAXM_VMS + HAXM_VMS * HAXM_VCPUS)

struct haxm_node {
	struct device device;
	kuid_t uid;
	kgid_t gid;
};

static dev_t haxm_region;
/* The kernel's own memory: it may hold on to it when the module is gone. */
static struct cdev *haxm_cdev;
static struct class *haxm_class;
/*
 * One for the module and one for each node. Whoever still looks at a node when
 * it is removed puts off the call that frees it, and the module must be there
 * for that call.
 */
static refcount_t haxm_nodes_held = REFCOUNT_INIT(1);
static DECLARE_COMPLETION(haxm_nodes_freed);
/* By minor. The core makes and removes one node after the other. */
static struct haxm_node *haxm_nodes[HAXM_MINORS];

static int haxm_open(struct file *file, u32 kind, u32 vm, u32 vcpu)
{
	void *handle = NULL;
	int err = haxm_core_open(kind, vm, vcpu, &handle);

	if (err)
		return err;
	file->private_data = handle;
	return 0;
}

static int haxm_open_system(struct inode *inode, struct file *file)
{
	return haxm_open(file, HAXM_NODE_SYSTEM, 0, 0);
}

static int haxm_open_child(struct inode *inode, struct file *file)
{
	u32 minor = iminor(inode) - MINOR(haxm_region);

	if (minor < HAXM_VMS)
		return haxm_open(file, HAXM_NODE_VM, minor, 0);
	minor -= HAXM_VMS;
	return haxm_open(file, HAXM_NODE_VCPU, minor / HAXM_VCPUS, minor % HAXM_VCPUS);
}

static int haxm_release(struct inode *inode, struct file *file)
{
	haxm_core_release(file->private_data);
	return 0;
}

/*
 * For 32-bit processes too: the structures are the same, and an address has
 * been extended by the caller of compat_ioctl.
 */
static long haxm_ioctl(struct file *file, unsigned int number, unsigned long argument)
{
	return haxm_core_ioctl(file->private_data, number, argument);
}

static const struct file_operations haxm_system_ops = {
	.owner = THIS_MODULE,
	.open = haxm_open_system,
	.release = haxm_release,
	.unlocked_ioctl = haxm_ioctl,
	.compat_ioctl = haxm_ioctl,
};

static const struct file_operations haxm_child_ops = {
	.owner = THIS_MODULE,
	.open = haxm_open_child,
	.release = haxm_release,
	.unlocked_ioctl = haxm_ioctl,
	.compat_ioctl = haxm_ioctl,
};

static struct miscdevice haxm_system = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "HAX",
	.fops = &haxm_system_ops,
};

/* Whoever made the VM owns its nodes. */
static char *haxm_devnode_of(const struct device *device, umode_t *mode, kuid_t *uid,
			     kgid_t *gid)
{
	const struct haxm_node *node = container_of(device, const struct haxm_node, device);

	if (mode)
		*mode = 0660;
	if (uid)
		*uid = node->uid;
	if (gid)
		*gid = node->gid;
	return NULL;
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
#define haxm_devnode haxm_devnode_of
#define haxm_class_create(name) class_create(name)
#else
static char *haxm_devnode(struct device *device, umode_t *mode, kuid_t *uid, kgid_t *gid)
{
	return haxm_devnode_of(device, mode, uid, gid);
}
#endif
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 4, 0)
#undef haxm_class_create
#define haxm_class_create(name) class_create(THIS_MODULE, name)
#endif

static const struct device_type haxm_node_type = {
	.name = "haxm",
	.devnode = haxm_devnode,
};

static void haxm_nodes_put(void)
{
	if (refcount_dec_and_test(&haxm_nodes_held))
		complete(&haxm_nodes_freed);
}

static void haxm_node_free(struct device *device)
{
	kfree(container_of(device, struct haxm_node, device));
	haxm_nodes_put();
}

static int haxm_minor(u32 kind, u32 vm, u32 vcpu)
{
	if (vm >= HAXM_VMS || vcpu >= HAXM_VCPUS)
		return -EINVAL;
	if (kind == HAXM_NODE_VM)
		return vm;
	return HAXM_VMS + vm * HAXM_VCPUS + vcpu;
}

/* devtmpfs has the node when device_add() returns. */
static int haxm_child_create(u32 kind, u32 vm, u32 vcpu)
{
	struct haxm_node *node;
	int minor = haxm_minor(kind, vm, vcpu);
	int err;

	if (minor < 0)
		return minor;
	node = kzalloc(sizeof(*node), GFP_KERNEL_ACCOUNT);
	if (!node)
		return -ENOMEM;
	if (cmpxchg(&haxm_nodes[minor], NULL, node)) {
		kfree(node);
		return -EEXIST;
	}
	node->uid = current_fsuid();
	node->gid = current_fsgid();
	refcount_inc(&haxm_nodes_held);
	device_initialize(&node->device);
	node->device.release = haxm_node_free;
	node->device.class = haxm_class;
	node->device.type = &haxm_node_type;
	node->device.devt = MKDEV(MAJOR(haxm_region), MINOR(haxm_region) + minor);
	/* A '/' becomes '!' in sysfs, and is one again in /dev. */
	if (kind == HAXM_NODE_VM)
		err = dev_set_name(&node->device, "hax_vm/vm%02u", vm);
	else
		err = dev_set_name(&node->device, "hax_vm%02u/vcpu%02u", vm, vcpu);
	if (!err)
		err = device_add(&node->device);
	if (err) {
		put_device(&node->device);
		WRITE_ONCE(haxm_nodes[minor], NULL);
	}
	return err;
}

int haxm_os_node_create(u32 kind, u32 vm, u32 vcpu)
{
	if (kind == HAXM_NODE_SYSTEM)
		return misc_register(&haxm_system);
	return haxm_child_create(kind, vm, vcpu);
}

void haxm_os_node_remove(u32 kind, u32 vm, u32 vcpu)
{
	struct haxm_node *node;
	int minor;

	if (kind == HAXM_NODE_SYSTEM) {
		misc_deregister(&haxm_system);
		return;
	}
	minor = haxm_minor(kind, vm, vcpu);
	if (minor < 0)
		return;
	node = READ_ONCE(haxm_nodes[minor]);
	if (!node)
		return;
	device_del(&node->device);
	put_device(&node->device);
	/* Only now may the same name be used again. */
	smp_store_release(&haxm_nodes[minor], NULL);
}

int haxm_devices_init(void)
{
	int err = alloc_chrdev_region(&haxm_region, 0, HAXM_MINORS, "haxm");

	if (err)
		return err;
	haxm_class = haxm_class_create("haxm");
	if (IS_ERR(haxm_class)) {
		err = PTR_ERR(haxm_class);
		goto no_class;
	}
	haxm_cdev = cdev_alloc();
	if (!haxm_cdev) {
		err = -ENOMEM;
		goto no_cdev;
	}
	haxm_cdev->ops = &haxm_child_ops;
	haxm_cdev->owner = THIS_MODULE;
	err = cdev_add(haxm_cdev, haxm_region, HAXM_MINORS);
	if (err)
		goto not_added;
	return 0;

not_added:
	kobject_put(&haxm_cdev->kobj);
no_cdev:
	class_destroy(haxm_class);
no_class:
	unregister_chrdev_region(haxm_region, HAXM_MINORS);
	return err;
}

void haxm_devices_exit(void)
{
	haxm_nodes_put();
	wait_for_completion(&haxm_nodes_freed);
	cdev_del(haxm_cdev);
	class_destroy(haxm_class);
	unregister_chrdev_region(haxm_region, HAXM_MINORS);
}
