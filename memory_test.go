package main

// What the Go runtime is told about memory.

import (
	"math"
	"runtime/debug"
	"testing"
)

// GOGC and GOMEMLIMIT win over the relay's own choice, and what it changed is restored.
func TestBoundMemoryLeavesTheOperatorsChoice(t *testing.T) {
	percent := func() int {
		n := debug.SetGCPercent(-1)
		debug.SetGCPercent(n)
		return n
	}
	before, limit := percent(), debug.SetMemoryLimit(-1)
	stop := boundMemory(1 << 30)
	if got := debug.SetMemoryLimit(-1); percent() == before || got != 1<<30 {
		t.Errorf("GC percent %d and limit %d, want another than %d and %d", percent(), got, before, 1<<30)
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

// A relay with few clients does not collect garbage all the time, and one with many
// does not take half as much memory again.
func TestGarbageIsAQuarterOfWhatLives(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct{ live, roots, garbage uint64 }{
		{10 * mib, 2 * mib, minGarbage},
		{90 * mib, 30 * mib, 90 * mib / 4},
		{400 * mib, 130 * mib, 100 * mib},
	} {
		garbage := (c.live + c.roots) * uint64(garbagePercent(c.live, c.roots, 0)) / 100
		if garbage > c.garbage || garbage < c.garbage*9/10 {
			t.Errorf("with %d MiB live and %d of roots: %d MiB of garbage, want %d", c.live/mib, c.roots/mib, garbage/mib, c.garbage/mib)
		}
	}
	// In a rush there may be more, until both take what there is room for.
	for _, c := range []struct{ live, garbage uint64 }{{40 * mib, 160 * mib}, {180 * mib, 180 * mib / 4}, {300 * mib, 75 * mib}} {
		if garbage := c.live * uint64(garbagePercent(c.live, 0, 200*mib)) / 100; garbage > c.garbage || garbage < c.garbage*9/10 {
			t.Errorf("in a rush with %d MiB live: %d MiB of garbage, want %d", c.live/mib, garbage/mib, c.garbage/mib)
		}
	}
	if percent := garbagePercent(0, 0, 0); percent < 100 || percent > 1000 {
		t.Errorf("GC percent %d with nothing live yet", percent)
	}
}
