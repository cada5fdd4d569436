//go:build interop

package main

// What a newcomer costs, beside the old relay in the same run:
//
//	go test -tags interop -run '^$' -bench Newcomers -benchtime 7x -timeout 1h .
//
// prints a table of medians, here of seven rounds (it begins with one round alone). It
// needs Linux and cargo. The relays take turns, because the machine's speed drifts, and get
// the same clients. The old relay is interop/src/bin/relay.rs.
//
// BENCH_PROFILE=dir writes profiles of this relay in each round there. OTHER_RELAYS names
// more relays to measure in the same rounds: built binaries of this program, separated by
// colons.

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// newcomersAtOnce is how many clients join one relay in a round.
const newcomersAtOnce = 5000

func BenchmarkNewcomers(b *testing.B) {
	old, err := cargoBuild("measured", "relay")
	if err != nil {
		b.Fatal(err)
	}
	room := fmt.Sprint("--max-clients=", newcomersAtOnce+1000)
	kinds := append([]string{"old relay", "this relay"}, filepath.SplitList(os.Getenv("OTHER_RELAYS"))...)
	start := func(kind string) *process {
		cmd := exec.Command(kind, "--port=0", "--http-port=0", room)
		switch kind {
		case "old relay":
			cmd = exec.Command(old, "--port", "0")
		case "this relay":
			return benchRelay(b, "product", room)
		}
		cmd.Dir = b.TempDir()
		return launch(b, cmd)
	}
	who := make([]lightIdentity, newcomersAtOnce)
	for i := range who {
		who[i] = newLightIdentity(b)
	}
	runs := make(map[string][]joined)
	for round := range b.N {
		for i := range kinds {
			kind := kinds[(round+i)%len(kinds)]
			p, profile := start(kind), func() {}
			if kind == "this relay" {
				profile = func() {
					p.profile(b, "profile?seconds=15", fmt.Sprintf("cpu-newcomers-%d.pb.gz", round))
					p.profile(b, "allocs", fmt.Sprintf("allocs-newcomers-%d.pb.gz", round))
				}
			}
			runs[kind] = append(runs[kind], benchJoin(b, p, who, round == b.N-1, profile))
		}
	}
	t := newTable()
	t.row("medians of", b.N, "rounds,", newcomersAtOnce, "clients")
	t.row("relay", "CPU ms each", "÷ old", "clients' CPU ms each", "÷ clients'", "new/s", "dials each", "peak KiB each", "÷ old", "KiB each at rest", "÷ old")
	for _, kind := range kinds {
		of := func(f func(joined) float64) float64 { return medianOf(runs[kind], f) }
		beside := func(f func(joined) float64) float64 { // of each round, against the old relay in it
			var ratios []float64
			for i, r := range runs[kind] {
				ratios = append(ratios, f(r)/f(runs[kinds[0]][i]))
			}
			return medianOf(ratios, func(r float64) float64 { return r })
		}
		cpu := func(j joined) float64 { return j.relay }
		peak := func(j joined) float64 { return j.peak }
		atRest := func(kind string) float64 { return runs[kind][b.N-1].atRest }
		t.row(filepath.Base(kind), of(cpu), beside(cpu), of(func(j joined) float64 { return j.clients }),
			of(func(j joined) float64 { return j.relay / j.clients }), of(func(j joined) float64 { return j.rate }),
			of(func(j joined) float64 { return j.dials }), of(peak), beside(peak), atRest(kind), atRest(kind)/atRest(kinds[0]))
	}
	fmt.Printf("\n%s\n", t)
}

// joined is what it took until all clients of a round were connected and identified.
type joined struct {
	relay, clients float64 // CPU ms for each client
	rate           float64 // clients per second
	dials          float64 // for each client
	peak, atRest   float64 // KiB for each client, beside what the relay takes alone
}

// benchJoin connects these clients to p, measures it, and ends p. With rest it also
// measures the memory a minute later. profile runs while they connect.
func benchJoin(b *testing.B, p *process, who []lightIdentity, rest bool, profile func()) joined {
	b.Helper()
	var profiling sync.WaitGroup
	defer func() { profiling.Wait(); p.kill() }()
	settle(b, p)
	c := newCrowd(b, len(who))
	defer c.close()
	alone, relay, clients, began := p.rss(b), p.cpu(b), ownCPU(b), time.Now()
	profiling.Go(profile)
	// A dial that fails because the machine is busy is made again.
	var dials atomic.Int64
	inParallel(b, len(who), 32, func(ctx context.Context, i int) (err error) {
		for range 5 {
			dials.Add(1)
			if _, err = c.dial(ctx, who[i], p.bootstrap); err == nil {
				return nil
			}
		}
		return err
	})
	took := time.Since(began)
	settle(b, p)
	each := func(total int64) float64 { return float64(total) / 1024 / float64(len(who)) }
	ms := func(total time.Duration) float64 { return total.Seconds() * 1000 / float64(len(who)) }
	j := joined{
		relay: ms(p.cpu(b) - relay), clients: ms(ownCPU(b) - clients),
		rate:  float64(len(who)) / took.Seconds(),
		dials: float64(dials.Load()) / float64(len(who)),
		peak:  each(p.peakRSS(b) - alone),
	}
	if rest {
		time.Sleep(givingBack + 5*time.Second)
		j.atRest = each(p.rss(b) - alone)
	}
	return j
}

// medianOf returns the median of what f takes out of all.
func medianOf[T any](all []T, f func(T) float64) float64 {
	var values []float64
	for _, v := range all {
		values = append(values, f(v))
	}
	slices.Sort(values)
	return values[len(values)/2]
}
