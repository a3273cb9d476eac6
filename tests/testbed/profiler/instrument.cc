/*
 * Counts instructions by address: see instrument.h.
 *
 * A row is a series of samples, each between two marks. A timer interrupt in one of them would spoil
 * a mean, so a row is written as the sum of those samples that are as long as the median. Its lines
 * in profile.txt, in the folder of the run:
 *
 *   @ROW NAME SAMPLES TICKS EXITS      samples in the sum, ticks and VM exits of one sample
 *   k|u|g ADDRESS COUNT                kernel, user or guest; hexadecimal; in all samples of the sum
 */

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "bochs.h"
#include "cpu/cpu.h"
#include "cpu/decoder/ia_opcodes.h"

bool haxm_profile_on = false;

namespace {

enum Where { KERNEL, USER, GUEST, WHERES };

typedef std::unordered_map<Bit64u, Bit64u> Counts;

struct Sample {
	Bit64u ticks = 0;
	Bit64u exits = 0;
	Counts counts[WHERES];
};

std::string name;
bool in_row = false;
std::vector<Sample> samples;
Sample sample;
/* Of the instruction being executed; a repeated one counts each repetition after the first. */
Bit64u *place = NULL;
bool repeats = false;

void row_ends()
{
	if (samples.empty())
		return;
	std::vector<Bit64u> lengths;
	for (const Sample &s : samples)
		lengths.push_back(s.ticks);
	std::sort(lengths.begin(), lengths.end());
	const Bit64u median = lengths[lengths.size() / 2];
	Sample sum;
	unsigned used = 0;
	for (const Sample &s : samples) {
		if (s.ticks != median)
			continue;
		used++;
		sum.exits += s.exits;
		for (int where = 0; where < WHERES; where++)
			for (const auto &c : s.counts[where])
				sum.counts[where][c.first] += c.second;
	}
	FILE *file = fopen("profile.txt", "a");
	if (!file)
		return;
	fprintf(file, "@ROW %s %u " FMT_LL "u " FMT_LL "u\n", name.c_str(), used, median,
		sum.exits / used);
	for (int where = 0; where < WHERES; where++)
		for (const auto &c : sum.counts[where])
			fprintf(file, "%c " FMT_LL "x " FMT_LL "u\n", "kug"[where], c.first, c.second);
	fclose(file);
}

void mark(BX_CPU_C *cpu, Bit32u which)
{
	switch (which) {
	case HAXM_MARK_ROW: {
		if (in_row)
			row_ends();
		in_row = cpu->gen_reg[BX_64BIT_REG_RAX].dword.erx != 0;
		samples.clear();
		char text[17] = {0};
		memcpy(text, &cpu->gen_reg[BX_64BIT_REG_RCX].rrx, 8);
		memcpy(text + 8, &cpu->gen_reg[BX_64BIT_REG_RDX].rrx, 8);
		name = text;
		haxm_profile_on = false;
		break;
	}
	case HAXM_MARK_BEGIN:
		sample = Sample();
		place = NULL;
		haxm_profile_on = in_row;
		break;
	default:
		if (haxm_profile_on)
			samples.push_back(sample);
		haxm_profile_on = false;
	}
}

} // namespace

void haxm_profile_instruction(unsigned number, bxInstruction_c *i)
{
	BX_CPU_C *cpu = BX_CPU(number);
	if (HAXM_MAY_BE_MARK(i) && i->getIaOpcode() == BX_IA_NOP) {
		mark(cpu, (Bit32u)i->displ32s());
		return;
	}
	if (!haxm_profile_on)
		return;
	const Where where = cpu->in_vmx_guest ? GUEST : cpu->get_cpl() == 3 ? USER : KERNEL;
	place = &sample.counts[where][cpu->get_instruction_pointer()];
	*place += 1;
	sample.ticks++;
	repeats = false;
}

void haxm_profile_repeat(void)
{
	if (repeats && place) {
		*place += 1;
		sample.ticks++;
	}
	repeats = true;
}

void haxm_profile_exit(void)
{
	sample.exits++;
}

void haxm_profile_out(Bit16u port, unsigned value)
{
	static FILE *file = NULL;

	if (port != HAXM_SYMBOL_PORT)
		return;
	if (!file)
		file = fopen("symbols.txt", "a");
	if (!file)
		return;
	fputc(value & 0xff, file);
	/* An empty line ends a list; the emulator may be killed at any time. */
	static int last = 0;
	if (value == '\n' && last == '\n')
		fflush(file);
	last = value;
}
