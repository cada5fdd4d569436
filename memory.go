package main

// Memory: how much this process may use, and what we tell the Go runtime about it. The
// runtime has to collect garbage before the heap has grown to twice what is in use, to
// stay within what limits.go promises, and to give back what a crowd that has left no
// longer needs.

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"

	"github.com/pbnjay/memory"
)

const (
	// Garbage comes on top of what lives, up to a garbageShare-th of it but at
	// least minGarbage, before it is collected. Go's default is as much again, which
	// took up to 37 MiB more at 2 000 clients. With a quarter, a tenth and a
	// fourteenth, 10 000 clients took 687, 650 and 652 MiB, and joining cost 1.8, 2.5
	// and 3.9 ms of CPU each. Below minGarbage there is little to gain, and busy
	// circuits would cause collections all the time.
	garbageShare = 4
	minGarbage   = 16 << 20

	// After a second in which more than rushAllocs bytes were allocated, as when 120
	// clients join (134 KiB each), the heap may grow to a rushShare-th of the limit before
	// garbage is collected. What lives of five sixths of the clients takes that much. With a
	// third of the limit joining costs 7 % less CPU, but 5 000 of 6 000 clients take up to
	// 84 KiB each instead of 73. Without more garbage in a rush it costs 46 % more CPU.
	rushAllocs = 16 << 20
	rushShare  = 4

	// measuring is how often we compute GOGC's percentage anew.
	measuring = time.Second

	// givingBack is how often free memory is returned to the system, if it is more
	// than spareMemory. That takes a collection, 0.1 s of CPU for 2 000 clients. The
	// runtime by itself took more than four minutes to return it.
	givingBack  = time.Minute
	spareMemory = 16 << 20

	// addressable is how much memory a 32-bit program may count on, in bytes. It can
	// address 3 to 4 GiB, but the heap cannot use all of that.
	addressable = uint64(2 << 30)
)

// boundMemory has the runtime do all of that, with limit in bytes, until stop restores
// the settings from before. It leaves alone what the operator chose by GOGC or GOMEMLIMIT.
func boundMemory(limit int64) (stop func()) {
	percent := livePercent(0)
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
		allocated := readMetric("/gc/heap/allocs:bytes")
		for {
			select {
			case <-measure.C:
				var room uint64
				sofar := allocated
				if allocated = readMetric("/gc/heap/allocs:bytes"); allocated-sofar > rushAllocs {
					room = uint64(limit) / rushShare
				}
				// Setting it stops the world, so only if it makes a difference.
				if now := livePercent(room); !chosen && max(now, percent)*10 > min(now, percent)*11 {
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

// garbagePercent returns the GOGC that lets garbage grow as far as it may when live bytes
// are in use, and at least until both take room bytes.
func garbagePercent(live, roots, room uint64) int {
	garbage := max(live/garbageShare, minGarbage)
	if room > live {
		garbage = max(garbage, room-live)
	}
	// The runtime applies the percentage to roots, too: stacks and globals.
	return int(100 * garbage / max(live+roots, minGarbage/4))
}

// livePercent returns garbagePercent for what is in use now.
func livePercent(room uint64) int {
	return garbagePercent(readMetric("/gc/heap/live:bytes"),
		readMetric("/gc/scan/stack:bytes")+readMetric("/gc/scan/globals:bytes"), room)
}

// readMetric reads a number of runtime/metrics.
func readMetric(name string) uint64 {
	sample := []metrics.Sample{{Name: name}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// availableMemory returns how many bytes this process may use, 0 if unknown, and the
// source of that number: the machine, or the cgroup, GOMEMLIMIT or 32-bit addresses if one
// of them allows less. root is the file system at "/".
func availableMemory(root fs.FS) (available uint64, source string) {
	atMost := func(limit uint64, by string) {
		if limit > 0 && (available == 0 || limit < available) {
			available, source = limit, by
		}
	}
	// TotalMemory asks sysinfo(2) or its like, because a sandbox may hide /proc/meminfo. But
	// in an LXC container sysinfo(2) tells what the host has, and /proc/meminfo, by lxcfs,
	// what the container has. There the cgroup's limit may be hidden, as Proxmox does it
	// (lxc.cgroup.dir.container.inner in lxc.container.conf(5)).
	atMost(memory.TotalMemory(), "machine")
	atMost(procMemory(root), "machine")
	if limit, err := cgroupMemory(root); err == nil {
		atMost(limit, "cgroup")
	}
	if limit := debug.SetMemoryLimit(-1); limit < math.MaxInt64 {
		atMost(uint64(limit), "GOMEMLIMIT")
	}
	if strconv.IntSize == 32 && available > 0 {
		atMost(addressable, "32-bit addresses")
	}
	return available, source
}

// procMemory returns how much memory /proc/meminfo says there is, in bytes, or 0.
func procMemory(root fs.FS) uint64 {
	meminfo, _ := fs.ReadFile(root, "proc/meminfo")
	for line := range strings.Lines(string(meminfo)) {
		var kib uint64
		if n, _ := fmt.Sscanf(line, "MemTotal: %d kB", &kib); n == 1 && kib <= math.MaxUint64>>10 {
			return kib << 10
		}
	}
	return 0
}

// cgroupMemory returns the smallest memory limit of this process's cgroup and those
// above it, in bytes, for cgroup v2 (memory.max) and v1 (memory.limit_in_bytes).
// https://docs.kernel.org/admin-guide/cgroup-v2.html
func cgroupMemory(root fs.FS) (uint64, error) {
	self, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return 0, err
	}
	limit, found := uint64(math.MaxUint64), false
	for line := range strings.Lines(string(self)) {
		// hierarchy:controllers:path, where version 2 has no controllers.
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		mount, file := "sys/fs/cgroup", "memory.max"
		if fields[1] != "" {
			mount, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
			if !strings.Contains(","+fields[1]+",", ",memory,") {
				continue
			}
		}
		// A container sees its own cgroup at the root, whatever the path says, so
		// skip directories that do not exist.
		for dir := path.Clean("/" + fields[2]); ; dir = path.Dir(dir) {
			data, err := fs.ReadFile(root, path.Join(mount, dir, file))
			if n, parseErr := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64); err == nil && parseErr == nil {
				limit, found = min(limit, n), true // "max" does not parse: none here
			}
			if dir == "/" {
				break
			}
		}
	}
	if !found {
		return 0, errors.New("no memory limit")
	}
	return limit, nil
}

// memoryInUse returns how many bytes the Go runtime has from the system, which is most
// of what the process takes.
func memoryInUse() uint64 {
	return readMetric("/memory/classes/total:bytes") - readMetric("/memory/classes/heap/released:bytes")
}
