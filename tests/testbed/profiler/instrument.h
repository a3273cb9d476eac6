/*
 * Counts the instructions that the emulated PC executes between two marks, by address.
 *
 * Takes the place of Bochs's instrument/stubs/instrument.h in the build that `cargo xtask profile`
 * uses; instrument.cc has the rest. Every hook that is not needed is empty.
 */

#ifndef HAXM_PROFILER_H
#define HAXM_PROFILER_H

class bxInstruction_c;

/*
 * A mark is a NOP with a memory operand and one of these displacements, 0F 1F 80 and 4 bytes. It does
 * nothing on any processor, in any mode, and does not exit from a guest. tests/bench/src/mark.rs has
 * the other side.
 */
/* EAX not 0: a row of this name (RCX, RDX: 16 characters) begins. EAX 0: it ends. */
#define HAXM_MARK_ROW 0x4d584148
/* A sample begins; a sample ends. */
#define HAXM_MARK_BEGIN 0x4d584149
#define HAXM_MARK_END 0x4d58414a
/* Bytes that are written here go to a file: the kernel's symbols. */
#define HAXM_SYMBOL_PORT 0xe9

extern bool haxm_profile_on;
void haxm_profile_instruction(unsigned cpu, bxInstruction_c *i);
void haxm_profile_repeat(void);
void haxm_profile_exit(void);
void haxm_profile_out(Bit16u port, unsigned value);

/* instrument.cc looks at the opcode too. */
#define HAXM_MAY_BE_MARK(i) ((unsigned)(i)->displ32s() - HAXM_MARK_ROW <= 2)

#define BX_INSTR_BEFORE_EXECUTION(cpu_id, i)                                                       \
	do {                                                                                       \
		if (haxm_profile_on || HAXM_MAY_BE_MARK(i))                                            \
			haxm_profile_instruction(cpu_id, i);                                       \
	} while (0)
#define BX_INSTR_REPEAT_ITERATION(cpu_id, i)                                                       \
	do {                                                                                       \
		if (haxm_profile_on)                                                               \
			haxm_profile_repeat();                                                     \
	} while (0)
#define BX_INSTR_VMEXIT(cpu_id, reason, qualification)                                             \
	do {                                                                                       \
		if (haxm_profile_on)                                                               \
			haxm_profile_exit();                                                       \
	} while (0)
#define BX_INSTR_OUTP(addr, len, val) haxm_profile_out(addr, val)

#define BX_INSTR_INIT_ENV()
#define BX_INSTR_EXIT_ENV()
#define BX_INSTR_INITIALIZE(cpu_id)
#define BX_INSTR_EXIT(cpu_id)
#define BX_INSTR_RESET(cpu_id, type)
#define BX_INSTR_HLT(cpu_id)
#define BX_INSTR_MWAIT(cpu_id, addr, len, flags)
#define BX_INSTR_DEBUG_PROMPT()
#define BX_INSTR_DEBUG_CMD(cmd)
#define BX_INSTR_CNEAR_BRANCH_TAKEN(cpu_id, branch_eip, new_eip)
#define BX_INSTR_CNEAR_BRANCH_NOT_TAKEN(cpu_id, branch_eip)
#define BX_INSTR_UCNEAR_BRANCH(cpu_id, what, branch_eip, new_eip)
#define BX_INSTR_FAR_BRANCH(cpu_id, what, prev_cs, prev_eip, new_cs, new_eip)
#define BX_INSTR_OPCODE(cpu_id, i, opcode, len, is32, is64)
#define BX_INSTR_EXCEPTION(cpu_id, vector, error_code)
#define BX_INSTR_INTERRUPT(cpu_id, vector)
#define BX_INSTR_HWINTERRUPT(cpu_id, vector, cs, eip)
#define BX_INSTR_CLFLUSH(cpu_id, laddr, paddr)
#define BX_INSTR_CACHE_CNTRL(cpu_id, what)
#define BX_INSTR_TLB_CNTRL(cpu_id, what, new_cr3)
#define BX_INSTR_PREFETCH_HINT(cpu_id, what, seg, offset)
#define BX_INSTR_AFTER_EXECUTION(cpu_id, i)
#define BX_INSTR_LIN_ACCESS(cpu_id, lin, phy, len, memtype, rw)
#define BX_INSTR_PHY_ACCESS(cpu_id, phy, len, memtype, rw)
#define BX_INSTR_INP(addr, len)
#define BX_INSTR_INP2(addr, len, val)
#define BX_INSTR_WRMSR(cpu_id, addr, value)

#endif
