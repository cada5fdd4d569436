package main

// Half an hour in which two thousand clients join, leave, publish, find and
// relay, each staying for half a minute on average where real ones stay for
// hours. It is no part of go test:
//
//	SOAK=30m go test -run Soak -v -timeout 1h .

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	soakClients = 2000
	soakStay    = 30 * time.Second // on average
	soakSamples = 60
)

// An operator who never restarts his relay finds out last.
func TestSoak(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("set SOAK to how long, such as 30m")
	}
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	// The test binary, because it serves profiles.
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "--port=0", "--http-port=0", "--max-clients=3000")
	cmd.Env = append(os.Environ(), benchRelayEnv+"=product")
	cmd.Dir = t.TempDir()
	p := launch(t, cmd)
	atRest := p.sample(t)

	c := newCrowd(t, soakClients)
	ctx, cancel := context.WithTimeout(context.Background(), length)
	defer cancel()
	var done soakCounts
	var clients sync.WaitGroup
	here := make([]atomic.Pointer[lightClient], soakClients) // by slot, while reserved
	for i := range here {
		clients.Go(func() {
			// Not all at once.
			for sleep(ctx, time.Duration(rand.Int64N(int64(soakStay)))) {
				done.stay(ctx, c, p, here, i)
			}
		})
	}
	var series []soakSample
	for sleep(ctx, length/soakSamples) {
		series = append(series, p.sample(t))
	}
	clients.Wait()
	t.Logf("%d joined, %d published, %d found, %d circuits, %d failures", done.joined.Load(), done.published.Load(), done.found.Load(), done.circuits.Load(), done.failed.Load())
	eventually(t, "the relay has the goroutines that it had", func() bool { return p.sample(t)[0] <= atRest[0]+10 })

	for i, name := range soakNames {
		values := make([]float64, len(series))
		for j := range series {
			values[j] = series[j][i]
		}
		t.Logf("%s\n%s", name, plot(values))
		// Its last quarter beside the second, when all had joined.
		quarter := len(values) / 4
		early, late := middle(values[quarter:2*quarter]), middle(values[3*quarter:])
		t.Logf("%s: %.0f early, %.0f late", name, early, late)
		if i < 3 && late > early*1.15+10 {
			t.Errorf("%s grew from %.0f to %.0f", name, early, late)
		}
	}
	if n := done.failed.Load(); n*100 > done.joined.Load() {
		t.Errorf("%d failures of %d stays, above 1 %%, such as: %v", n, done.joined.Load(), *done.why.Load())
	}
}

type soakCounts struct {
	joined, published, found, circuits, failed atomic.Int64
	why                                        atomic.Pointer[error]
}

// stay is one visit of a client, in slot i: every other one is its mate.
func (n *soakCounts) stay(ctx context.Context, c *crowd, p *process, here []atomic.Pointer[lightClient], i int) {
	// step is false where it failed, and not because the soak has ended.
	step := func(do func(ctx context.Context) error) bool {
		within, cancel := context.WithTimeout(ctx, 2*testTimeout)
		defer cancel()
		err := do(within)
		if err != nil && ctx.Err() == nil {
			n.failed.Add(1)
			n.why.Store(&err)
		}
		return err == nil
	}
	var client *lightClient
	if !step(func(ctx context.Context) (err error) {
		client, err = c.newcomer(ctx, p.bootstrap)
		return err
	}) {
		return
	}
	defer client.CloseWithError(0, "")
	n.joined.Add(1)
	if !step(client.reserve) {
		return
	}
	here[i].Store(client)
	defer here[i].Store(nil)
	staying, leave := context.WithCancel(ctx)
	defer leave()
	go func() { // takes circuits, until it leaves
		for staying.Err() == nil {
			if s, err := client.accept(staying); err == nil {
				go io.Copy(io.Discard, s)
			}
		}
	}()
	for sleep(ctx, time.Duration(rand.Int64N(int64(soakStay)))) {
		if !step(func(ctx context.Context) error { return client.put(ctx, fmt.Sprint("slot ", i/2)) }) {
			return
		}
		n.published.Add(1)
		step(func(ctx context.Context) error {
			found, err := client.named(ctx, client.id)
			if found {
				n.found.Add(1)
			}
			return err
		})
		// A mate may be leaving just then: that is no failure.
		if mate := here[i^1].Load(); mate != nil {
			within, cancel := context.WithTimeout(ctx, 2*testTimeout)
			if s, err := client.circuit(within, mate.id); err == nil {
				s.Write(make([]byte, 64<<10))
				s.Close()
				s.CancelRead(0)
				n.circuits.Add(1)
			}
			cancel()
		}
		if rand.IntN(2) == 0 {
			return
		}
	}
}

// sleep is false where ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// soakSample is one look at the relay, in the order of soakNames.
type soakSample [4]float64

var soakNames = [...]string{"goroutines", "live heap, KiB", "open files", "RSS, MiB"}

// sample asks a relay that the test binary runs.
func (p *process) sample(t *testing.T) (s soakSample) {
	t.Helper()
	_, rest, _ := strings.Cut(p.stdout, "Profiles: ")
	base, _, _ := strings.Cut(rest, "\n")
	get := func(path, before string) (n float64) {
		resp, err := http.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		_, after, _ := bytes.Cut(body, []byte(before))
		if _, err := fmt.Fscan(bytes.NewReader(after), &n); err != nil {
			t.Fatalf("no figure after %q: %v", before, err)
		}
		return n
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return soakSample{
		get("/goroutine?debug=1", "total "),
		get("/heap?debug=1&gc=1", "# HeapAlloc = ") / 1024,
		float64(len(files)),
		float64(p.rss(t)) / (1 << 20),
	}
}

// plot draws values from zero up, one column each.
func plot(values []float64) string {
	const rows = 8
	top := max(slices.Max(values), 1)
	var b strings.Builder
	for row := rows; row > 0; row-- {
		label := ""
		if row == rows {
			label = fmt.Sprintf("%.0f", top)
		}
		fmt.Fprintf(&b, "%9s |", label)
		for _, v := range values {
			// Eighths of a row.
			eighths := min(max(int(v/top*rows*8)-(row-1)*8, 0), 8)
			b.WriteRune([]rune(" ▁▂▃▄▅▆▇█")[eighths])
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, "%9d +%s", 0, strings.Repeat("-", len(values)))
	return b.String()
}

// middle is the median, and sorts nothing.
func middle(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
