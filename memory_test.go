package main

import (
	"math"
	"runtime/debug"
	"testing"
)

// An operator who sets GOGC or GOMEMLIMIT is obeyed, and what is changed is put
// back.
func TestBoundMemoryLeavesTheOperatorsChoice(t *testing.T) {
	percent := func() int {
		n := debug.SetGCPercent(-1)
		debug.SetGCPercent(n)
		return n
	}
	before, limit := percent(), debug.SetMemoryLimit(-1)
	stop := boundMemory(1 << 30)
	if got := debug.SetMemoryLimit(-1); percent() != gcPercent || got != 1<<30 {
		t.Errorf("GC percent %d and limit %d, want %d and %d", percent(), got, gcPercent, 1<<30)
	}
	stop()
	t.Setenv("GOGC", "100")
	t.Setenv("GOMEMLIMIT", "off")
	stop = boundMemory(1 << 30)
	if got := debug.SetMemoryLimit(-1); percent() != before || got != limit || limit != math.MaxInt64 {
		t.Errorf("with GOGC and GOMEMLIMIT set: GC percent %d and limit %d, want %d and %d", percent(), got, before, limit)
	}
	stop()
	if got := debug.SetMemoryLimit(-1); percent() != before || got != limit {
		t.Errorf("afterwards: GC percent %d and limit %d, want %d and %d", percent(), got, before, limit)
	}
}
