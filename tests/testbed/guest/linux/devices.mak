# QEMU's device list: the two machines the guest runs on, and what its tests may want.
CONFIG_I440FX=y
CONFIG_MICROVM=y
CONFIG_HPET=y
CONFIG_ISA_DEBUG=y
CONFIG_TEST_DEVICES=y
CONFIG_PCI_DEVICES=n
