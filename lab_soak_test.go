package main

// A soak: for half an hour, two thousand clients join, publish, find each other, open
// circuits and leave. Each stays for half a minute on average, where real ones stay for
// hours. go test alone skips it:
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

// A relay that is never restarted must not grow.
func TestSoak(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("set SOAK to the length of the soak, such as 30m")
	}
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	// The test binary is the relay here, because it serves profiles.
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
	here := make([]atomic.Pointer[lightClient], soakClients) // clients with a reservation, by slot
	for i := range here {
		clients.Go(func() {
			// They do not all come at once.
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
	eventually(t, "the relay has no more goroutines than at first", func() bool { return p.sample(t)[0] <= atRest[0]+10 })

	for i, name := range soakNames {
		values := make([]float64, len(series))
		for j := range series {
			values[j] = series[j][i]
		}
		t.Logf("%s\n%s", name, plot(values))
		// Compare the last quarter with the second, when all had joined.
		quarter := len(values) / 4
		early, late := middle(values[quarter:2*quarter]), middle(values[3*quarter:])
		t.Logf("%s: %.0f early, %.0f late", name, early, late)
		if i < 3 && late > early*1.15+10 {
			t.Errorf("%s grew from %.0f to %.0f", name, early, late)
		}
	}
	if n := done.failed.Load(); n*100 > done.joined.Load() {
		t.Errorf("%d of %d stays failed, more than 1 %%; the last error is: %v", n, done.joined.Load(), *done.why.Load())
	}
}

type soakCounts struct {
	joined, published, found, circuits, failed atomic.Int64
	why                                        atomic.Pointer[error]
}

// stay is one visit of a client in slot i. Its mate is in the slot beside it.
func (n *soakCounts) stay(ctx context.Context, c *crowd, p *process, here []atomic.Pointer[lightClient], i int) {
	// step reports whether do succeeded, and counts it as a failure if not, unless the soak
	// has ended.
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
	go func() { // takes circuits until the client leaves
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
		// It is no failure if the mate is just leaving.
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

// sleep waits for d, and reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// soakSample has the figures of the relay at one moment, in the order of soakNames.
type soakSample [4]float64

var soakNames = [...]string{"goroutines", "live heap, KiB", "open files", "RSS, MiB"}

// sample takes the figures of a relay that runs in the test binary.
func (p *process) sample(t *testing.T) (s soakSample) {
	t.Helper()
	get := func(path, before string) (n float64) {
		resp, err := http.Get(p.profiles() + path)
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

// plot draws a column for each value, from zero up.
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

// middle returns the median, and leaves values in their order.
func middle(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
