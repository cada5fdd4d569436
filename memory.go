package main

// What the Go runtime is told about memory: to collect before it grows to twice
// what is in use, to stay within what was promised, and to give back what a
// crowd that has left no longer needs.

import (
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// Garbage comes on top of what lives, up to a garbageShare-th of it but at
	// least minGarbage, before it is collected. Go's own is as much again, up to
	// 37 MiB more at 2 000 clients. With a quarter, a tenth and a fourteenth 10 000
	// clients took 687, 650 and 652 MiB, and 1.8, 2.5 and 3.9 ms of CPU each to come.
	// Below minGarbage there would be little to gain, and collections all the time
	// while circuits carry all they can.
	garbageShare = 4
	minGarbage   = 16 << 20

	// measuring is how often that is worked out anew.
	measuring = time.Second

	// givingBack is how often memory that is free is returned to the system, if
	// it is more than spareMemory. It takes a collection, 0.1 s of CPU for 2 000
	// clients; by itself the runtime took more than four minutes.
	givingBack  = time.Minute
	spareMemory = 16 << 20
)

// boundMemory applies that to this process, with limit in bytes, until stop has
// put all back as it was. What the operator chose by GOGC or GOMEMLIMIT stays.
func boundMemory(limit int64) (stop func()) {
	percent := livePercent()
	before := debug.SetGCPercent(percent)
	most := debug.SetMemoryLimit(limit)
	chosen := os.Getenv("GOGC") != ""
	if chosen {
		debug.SetGCPercent(before)
	}
	if os.Getenv("GOMEMLIMIT") != "" {
		debug.SetMemoryLimit(most)
	}
	stopping, done := make(chan struct{}), make(chan struct{})
	go func() { // stop waits for it
		defer close(done)
		measure, giveBack := time.NewTicker(measuring), time.NewTicker(givingBack)
		defer measure.Stop()
		defer giveBack.Stop()
		for {
			select {
			case <-measure.C:
				// Setting it stops the world, so only where it makes a difference.
				if now := livePercent(); !chosen && max(now, percent)*10 > min(now, percent)*11 {
					percent = now
					debug.SetGCPercent(percent)
				}
			case <-giveBack.C:
				if readMetric("/memory/classes/heap/free:bytes") > spareMemory {
					debug.FreeOSMemory()
				}
			case <-stopping:
				return
			}
		}
	}()
	return func() {
		close(stopping)
		<-done
		debug.SetGCPercent(before)
		debug.SetMemoryLimit(most)
	}
}

// garbagePercent is GOGC for a heap of which live bytes are in use.
func garbagePercent(live, roots uint64) int {
	// The runtime takes its percentage of roots, too: stacks and globals.
	return int(100 * max(live/garbageShare, minGarbage) / max(live+roots, minGarbage/4))
}

// livePercent is garbagePercent now.
func livePercent() int {
	return garbagePercent(readMetric("/gc/heap/live:bytes"),
		readMetric("/gc/scan/stack:bytes")+readMetric("/gc/scan/globals:bytes"))
}

// readMetric reads a number of runtime/metrics.
func readMetric(name string) uint64 {
	sample := []metrics.Sample{{Name: name}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
