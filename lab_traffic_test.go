//go:build interop

package main

// What deployed clients ask of a relay while nothing happens, and what a bridge carries
// between two that have nothing to sync. lab_scale_test.go computes with these figures. It
// needs what lab_pairs_test.go needs, and takes seven minutes:
//
//	go test -tags interop -run '^$' -bench RustTraffic -benchtime 1x -timeout 20m .

import (
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	// trafficStart is how long clients have to start and meet, and trafficTime is how long
	// they are watched: ten of their ticks, and kad's own look around, which it repeats
	// every 5 minutes.
	trafficStart = time.Minute
	trafficTime  = 5 * time.Minute
)

// BenchmarkRustTraffic prints a table with a line for each size of group.
func BenchmarkRustTraffic(b *testing.B) {
	var sites []watchedSite
	kinds := []struct {
		groups, size int
		at           place
	}{{0, 1, atPublic}, {5, 1, atRestricted}, {10, 2, atPublic}, {10, 2, atRestricted}, {4, 5, atRestricted}}
	for _, kind := range kinds {
		l := newLab(b)
		ns := l.public("relay", "11.0.0.1/8")
		s := watchedSite{l.site(ns, "--metrics=127.0.0.1:4003"), ns}
		for n := range kind.groups * kind.size {
			s.join(s.place(kind.at, n), fmt.Sprint("group ", n/kind.size))
		}
		sites = append(sites, s)
	}
	time.Sleep(trafficStart)
	var before []map[string]float64
	for _, s := range sites {
		before = append(before, s.metrics())
	}
	time.Sleep(trafficTime)

	t := newTable()
	t.row("groups", "of", "at", "bridges", "requests per device: first minute", "then in 30 s: FIND_NODE", "PUT_VALUE", "GET_VALUE", "in 30 s: bytes per bridge", "the relay received per device", "and sent", "packets sent", "relay CPU ms in all")
	ticks := trafficTime.Seconds() / 30
	for i, s := range sites {
		now, devices := s.metrics(), float64(max(kinds[i].groups*kinds[i].size, 1))
		perTick := func(name string) float64 { return (now[name] - before[i][name]) / ticks }
		cells := []any{kinds[i].groups, kinds[i].size, kinds[i].at, int(now["bridges"])}
		first := 0.0
		var later []any
		for _, kind := range []string{"find_node", "put_value", "get_value"} {
			name := `requests_total{type="` + kind + `"}`
			first += before[i][name]
			later = append(later, perTick(name)/devices)
		}
		cells = append(append(cells, first/devices), later...)
		t.row(append(cells, int(perTick(`relayed_bytes_total{kind="bridge"}`)/max(now["bridges"], 1)),
			int(perTick("rx_bytes")/devices), int(perTick("tx_bytes")/devices), int(perTick("tx_packets")/devices), 1000*perTick("cpu"))...)
	}
	fmt.Printf("\n%s\n", t)
}

// watchedSite is a site, and the namespace of its relay.
type watchedSite struct {
	*site
	ns string
}

// metrics returns the relay's own metrics by their name, without privstack_relay_; what
// has come in and gone out at its interface, by the kernel's names; and as cpu the seconds
// of CPU that it has used.
func (s watchedSite) metrics() map[string]float64 {
	s.t.Helper()
	read := func(command string) string {
		out, err := exec.Command("ip", "netns", "exec", s.ns, "sh", "-c", command).Output()
		if err != nil {
			s.t.Fatalf("%s: %v", command, err)
		}
		return string(out)
	}
	text := read("curl -sS http://127.0.0.1:4003/metrics")
	for _, name := range []string{"rx_bytes", "tx_bytes", "tx_packets"} {
		text += name + " " + read("cat /sys/class/net/wan/statistics/"+name)
	}
	all := map[string]float64{"cpu": s.relay.cpu(s.t).Seconds()}
	for _, match := range regexp.MustCompile(`(?m)^(\S+) (\S+)$`).FindAllStringSubmatch(text, -1) {
		value, err := strconv.ParseFloat(match[2], 64)
		if err != nil {
			s.t.Fatalf("metrics: %q: %v", match[0], err)
		}
		all[strings.TrimPrefix(match[1], "privstack_relay_")] = value
	}
	return all
}
