package main

// The bounds: that they follow from --max-clients, fit each other, and fit into memory.

import (
	"math"
	"strconv"
	"testing"
	"testing/fstest"
	"time"
)

// The default for --max-clients has to be right, because few operators will change it.
func TestClientsForMemory(t *testing.T) {
	tests := []struct {
		memory   uint64
		min, max int
	}{
		{0, 1000, 10_000},                        // unknown
		{1 << 20, 64, 64},                        // too small for anyone, but it starts
		{512 << 20, 2300, 6000},                  //
		{1 << 30, 5000, 12_000},                  // the 5-dollar machine
		{4 << 30, 20_000, 55_000},                //
		{1 << 50, maxMaxClients, 1 << 20},        //
		{math.MaxUint64, maxMaxClients, 1 << 20}, //
	}
	for _, tt := range tests {
		if got := clientsFor(tt.memory); got < tt.min || got > tt.max {
			t.Errorf("clientsFor(%d) = %d, want between %d and %d", tt.memory, got, tt.min, tt.max)
		}
	}
}

// In a container its own memory limit counts, not the machine's memory.
func TestCgroupMemory(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	tests := []struct {
		name string
		root fstest.MapFS
		want uint64 // 0: none
	}{
		{"none", fstest.MapFS{}, 0},
		{"v2, unlimited", fstest.MapFS{
			"proc/self/cgroup":         file("0::/\n"),
			"sys/fs/cgroup/memory.max": file("max\n")}, 0},
		{"v2, in a container", fstest.MapFS{
			"proc/self/cgroup":         file("0::/\n"),
			"sys/fs/cgroup/memory.max": file("268435456\n")}, 256 << 20},
		{"v2, the smallest on the way up", fstest.MapFS{
			"proc/self/cgroup": file("0::/system.slice/relay.service\n"),
			"sys/fs/cgroup/system.slice/relay.service/memory.max": file("max\n"),
			"sys/fs/cgroup/system.slice/memory.max":               file("536870912\n")}, 512 << 20},
		{"v1", fstest.MapFS{
			"proc/self/cgroup": file("9:cpu,cpuacct:/a\n4:memory:/a\n0::/b\n"),
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes": file("134217728\n"),
			"sys/fs/cgroup/memory/memory.limit_in_bytes":   file("9223372036854771712\n")}, 128 << 20},
		{"nonsense", fstest.MapFS{"proc/self/cgroup": file("\n:::\nx\n0::/../..\n")}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := cgroupMemory(tt.root)
			if got != tt.want && !(tt.want == 0 && err != nil) {
				t.Errorf("cgroupMemory = %d, %v, want %d", got, err, tt.want)
			}
		})
	}
}

// In a container of LXC, /proc/meminfo alone may say how much memory it has. And the
// program for 32 bits runs on machines that have more memory than it can address.
func TestAvailableMemory(t *testing.T) {
	machine, _ := availableMemory(fstest.MapFS{})
	for _, tt := range []struct {
		meminfo string
		want    uint64
	}{
		{"MemTotal:         131072 kB\nMemFree:           65536 kB\n", 128 << 20},
		{"MemTotal:       99999999999 kB\n", machine},
		{"MemTotal:\nMemTotal: kB\nMemFree: 1024 kB\n", machine},
		{"MemTotal: 18446744073709551615 kB\n", machine},
	} {
		root := fstest.MapFS{"proc/meminfo": {Data: []byte(tt.meminfo)}}
		if got, source := availableMemory(root); got != tt.want {
			t.Errorf("availableMemory with %q = %d (%s), want %d", tt.meminfo, got, source, tt.want)
		}
	}
	if strconv.IntSize == 32 && machine > addressable {
		t.Errorf("a 32-bit program may use %d bytes, want %d at most", machine, addressable)
	}
}

// Every bound follows from --max-clients, so that no other is reached first.
func TestLimitsFollowMaxClients(t *testing.T) {
	for _, clients := range []int{1, 100, 10_000, maxMaxClients} {
		l := limits{clients: clients, perNetwork: 256}
		res := l.circuitResources(time.Hour, 1<<30)
		if res.MaxReservations != clients || res.MaxReservationsPerIP < clients || res.MaxReservationsPerASN < clients {
			t.Errorf("%d clients: reservations are limited to %+v", clients, res)
		}
		host := l.resourceLimits(0).ToPartialLimitConfig()
		if int(host.System.ConnsInbound) != clients || int(host.Transient.ConnsInbound) != clients {
			t.Errorf("%d clients: connections are limited to %d, %d in the handshake", clients, host.System.ConnsInbound, host.Transient.ConnsInbound)
		}
		if min := 2 * l.circuits(); int(host.System.Streams) < min {
			t.Errorf("%d clients: %d streams, want %d for the circuits alone", clients, host.System.Streams, min)
		}
		// go-libp2p lets circuit buffers take 80 % of a scope's memory.
		buffers := int64(l.circuits()) * 2 * circuitBuffer // the streams are in their peers' shares
		if int64(host.System.Memory)/5*4 < buffers || int64(host.Service["libp2p.relay/v2"].Memory)/5*4 < buffers {
			t.Errorf("%d clients: memory for circuits is short of %d bytes", clients, buffers)
		}
		// The memory that the start log promises is enough for all of it.
		if sum := baseMemory + int64(clients)*(clientMemory+bridgeMemory+initialWindow+freeFlight+shareMemory) + int64(host.System.Memory); l.memory() < sum {
			t.Errorf("%d clients: the start log promises %d bytes, and they could take %d", clients, l.memory(), sum)
		}
	}
}

// The largest possible answer stays below rust-libp2p's limit of 16 KiB.
func TestLargestAnswerFitsRust(t *testing.T) {
	const (
		perPeer = maxAddrBytesPerPeer + 2 + 42 + 10 // ID and framing
		record  = maxRecordKey + maxRecordValue + maxRecordExtras + 64
	)
	if total := maxNamed*perPeer + record + maxRecordKey + 32; total > 16<<10 {
		t.Errorf("the largest answer has %d bytes, more than rust-libp2p's %d", total, 16<<10)
	}
}
