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
	// gcPercent is how much garbage may come on top of what is live before it is
	// collected; Go's own is 100.
	gcPercent = 50

	// givingBack is how often memory that is free is returned to the system, if
	// it is more than spareMemory. It takes a collection, 0.1 s of CPU for 2 000
	// clients; by itself the runtime took more than four minutes.
	givingBack  = time.Minute
	spareMemory = 16 << 20
)

// boundMemory applies that to this process, with limit in bytes, until stop has
// put all back as it was. What the operator chose by GOGC or GOMEMLIMIT stays.
func boundMemory(limit int64) (stop func()) {
	before := debug.SetGCPercent(gcPercent)
	most := debug.SetMemoryLimit(limit)
	if os.Getenv("GOGC") != "" {
		debug.SetGCPercent(before)
	}
	if os.Getenv("GOMEMLIMIT") != "" {
		debug.SetMemoryLimit(most)
	}
	stopping, done := make(chan struct{}), make(chan struct{})
	go func() { // stop waits for it
		defer close(done)
		tick := time.NewTicker(givingBack)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if freeMemory() > spareMemory {
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

// freeMemory is what the heap has free and not given back, in bytes.
func freeMemory() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/free:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
