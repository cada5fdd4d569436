package main

// How much one relay carries, measured with the relay as a process of its own so
// that its CPU and memory are counted apart from the clients':
//
//	go test -run '^$' -bench Capacity -benchtime 1x -timeout 1h .
//
// prints one table. It needs Linux, for /proc. Nothing here is asserted: figures
// of one machine are no test. Ratios are of one run, because absolute figures
// drift by 30 % on a shared machine.
//
// What dominates, by profiles of the relay with 8 circuits: 27 % is what quic-go
// does with packets that came and 22 % with those to send (14 % of all is AES),
// 23 % is sendmsg, 5 % recvmmsg, 14 % the copy from stream to stream, 3 % the copy
// out of what the kernel coalesced, 4 % scheduling, 1 % garbage. So a relay costs
// one receive and one send, as its two clients do together, and the copies: their
// CPU is the limit, about 1.05 times, unless quic-go spends less on a packet.
//
// Tried, and left because nothing sure was gained: copy buffers of 64 and 256 KiB
// (relay / clients' CPU 1.09 and 1.04 for 1.05 with 16 KiB, means of 1, 8 and 64
// circuits), profile-guided optimisation (1.08 for 1.08, and ten times the build
// time), QUIC windows below 1 MiB or above, a GOMAXPROCS above the cores, a yield
// before each read, no per-read timers.
//
// A circuit's latency while others carry all they can is time in queues, above
// all in the socket's: with receive buffers of 128, 256, 512 KiB, 1, 2 and 7 MiB
// the 99th percentile was 7.5, 11, 15, 20, 28 and 31 ms, the median 1.0, 2.4, 4.4,
// 6.0, 11 and 11. From 512 KiB on that costs no throughput here, but 7 MiB, which
// quic-go asks for, are there for a thousand clients that come back at once and for
// a machine whose CPU is taken away for some milliseconds. The rest is the run
// queue of the Go scheduler: a round trip is 10 turns of goroutines, each behind some six others
// that want the same two cores. Windows of 128 KiB halve it, too, at the price of
// 2.5 MiB/s for a circuit over 50 ms. Marking what waited in the socket for 1 ms as
// congested (ECN) brings the 99th from 22 to 8 ms for a quarter of the throughput.
//
// Of a client's 68 KiB at 10 000, 37 are live heap: 35 of them what quic-go and
// crypto/tls keep of a connection. 13 are the stacks of its three goroutines, 9
// garbage and the rest heap between what lives.
//
// BENCH_PROFILE=dir writes CPU and heap profiles of the relay there.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	_ "net/http/pprof" // served by runBenchRelay alone
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/libp2p/go-libp2p"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/network"
	circuit "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	quic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	ma "github.com/multiformats/go-multiaddr"
	quicgo "github.com/quic-go/quic-go"
)

// benchRelayEnv tells the test binary that it is a relay: "product", which is
// this program with a profiler, or "baseline", which is what go-libp2p makes of
// its default resources.
const benchRelayEnv = "PRIVSTACK_BENCH_RELAY"

// runBenchRelay is such a relay's process, until it is killed.
func runBenchRelay(kind string, args []string) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go http.Serve(ln, nil)
	fmt.Printf("Profiles: http://%s/debug/pprof\n", ln.Addr())
	if kind == "product" {
		return run(context.Background(), args, os.Stdout, os.Stderr)
	}
	h, err := libp2p.New(
		libp2p.Transport(quic.NewTransport),
		libp2p.ListenAddrStrings("/ip4/127.0.0.1/udp/0/quic-v1"),
		libp2p.ResourceManager(&network.NullResourceManager{}),
		libp2p.DisableRelay(),
	)
	if err != nil {
		return err
	}
	defaults := circuit.DefaultResources()
	defaults.Limit = nil // 128 KiB would measure nothing
	defaults.MaxReservationsPerIP, defaults.MaxReservationsPerASN = 1000, 1000
	_, err = circuit.New(h, circuit.WithResources(defaults), circuit.WithReservationAddressFilter(func(ma.Multiaddr) bool { return true }))
	if err != nil {
		return err
	}
	io.WriteString(os.Stdout, served{peerID: h.ID().String(), reachable: strs(h.Addrs())}.banner())
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	return nil
}

// benchRelay starts the built binary, or the test binary as what kind says.
func benchRelay(b *testing.B, kind string, args ...string) *process {
	b.Helper()
	dir := os.Getenv("BENCH_PROFILE")
	if kind == "product" && dir == "" {
		return start(b, args...)
	}
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(exe, append([]string{"--port=0", "--http-port=0"}, args...)...)
	cmd.Env = append(os.Environ(), benchRelayEnv+"="+kind)
	cmd.Dir = b.TempDir()
	return launch(b, cmd)
}

// profile writes the relay's profile of that name ("heap", "profile?seconds=5")
// to BENCH_PROFILE, if it is set.
func (p *process) profile(b *testing.B, name, file string) {
	b.Helper()
	dir := os.Getenv("BENCH_PROFILE")
	if dir == "" {
		return
	}
	_, rest, _ := strings.Cut(p.stdout, "Profiles: ")
	base, _, _ := strings.Cut(rest, "\n")
	resp, err := http.Get(base + "/" + name)
	if err != nil {
		b.Error(err)
		return
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, file), data, 0o644)
	}
	if err != nil {
		b.Error(err)
	}
}

// cpu is what the process has used so far, of all its threads, in steps of 10 ms.
func (p *process) cpu(t testing.TB) time.Duration { t.Helper(); return cpuOf(t, p.Process.Pid) }

// ownCPU is what this process, the clients', has used so far.
func ownCPU(t testing.TB) time.Duration { t.Helper(); return cpuOf(t, os.Getpid()) }

func cpuOf(t testing.TB, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// After the name, which may hold anything: utime and stime are the 14th and
	// 15th field (proc_pid_stat(5)), in ticks of USER_HZ, which is 100.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// rss is the process's resident memory in bytes, and peakRSS the most that it had.
func (p *process) rss(t testing.TB) int64     { t.Helper(); return p.status(t, "VmRSS:") }
func (p *process) peakRSS(t testing.TB) int64 { t.Helper(); return p.status(t, "VmHWM:") }

// status is a figure of /proc/PID/status, in bytes.
func (p *process) status(t testing.TB, name string) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), name)
	var kib int64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// table collects what is measured.
type table struct {
	text strings.Builder
	w    *tabwriter.Writer
}

func newTable() *table {
	t := &table{}
	t.w = tabwriter.NewWriter(&t.text, 0, 8, 2, ' ', 0)
	return t
}

func (t *table) row(cells ...any) {
	for _, c := range cells {
		switch c := c.(type) {
		case float64:
			fmt.Fprintf(t.w, "%.2f\t", c)
		case time.Duration:
			fmt.Fprintf(t.w, "%v\t", c.Round(10*time.Microsecond))
		default:
			fmt.Fprintf(t.w, "%v\t", c)
		}
	}
	fmt.Fprintln(t.w)
}

func (t *table) String() string {
	t.w.Flush()
	return t.text.String()
}

// percentile sorts d.
func percentile(d []time.Duration, p float64) time.Duration {
	slices.Sort(d)
	return d[min(int(float64(len(d))*p), len(d)-1)]
}

// BenchmarkCapacity prints the table. Its parts can be run one by one, as
// -bench Capacity/throughput.
func BenchmarkCapacity(b *testing.B) {
	if runtime.GOOS != "linux" {
		b.Skip("needs /proc")
	}
	info, _ := os.ReadFile("/proc/cpuinfo")
	_, model, _ := strings.Cut(string(info), "model name")
	model, _, _ = strings.Cut(model, "\n")
	t := newTable()
	t.row("machine", fmt.Sprint(runtime.NumCPU(), " cores,", strings.TrimLeft(model, "\t: "), ", ", runtime.Version()))
	for _, part := range []struct {
		name string
		run  func(*testing.B, *table)
	}{
		{"start", benchStart},
		{"throughput", benchThroughput},
		{"latency", benchLatency},
		{"bandwidth", benchBandwidth},
		{"clients", benchClients},
	} {
		b.Run(part.name, func(b *testing.B) { part.run(b, t) })
	}
	fmt.Printf("\n%s\n", t)
}

// benchStart measures from the start of the process to its first DHT answer.
func benchStart(b *testing.B, t *table) {
	var took []time.Duration
	c := newCrowd(b, 1)
	who := newLightIdentity(b)
	if _, err := buildBinary(); err != nil {
		b.Fatal(err)
	}
	for range 7 {
		began := time.Now()
		p := benchRelay(b, "product")
		client, err := c.dial(testContext(b), who, p.bootstrap)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := client.named(testContext(b), who.id); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
		client.CloseWithError(0, "")
		p.kill()
	}
	t.row("start to first answer (with a new key), median", percentile(took, 0.5))
}

// kill ends the process now.
func (p *process) kill() {
	p.Process.Kill()
	<-p.rest
	p.Cmd.Wait()
}

// link is a stream between two clients, by a circuit or direct.
type link struct{ from, to *quicgo.Stream }

// benchCircuits opens n circuits, each between two clients of its own on sockets of
// their own.
func benchCircuits(b *testing.B, p *process, n int) (clients [][2]*lightClient, links []link) {
	b.Helper()
	c := newCrowdOn(b, 2*n)
	for range n {
		var pair [2]*lightClient
		for i := range pair {
			who := newLightIdentity(b)
			// So that it is offered the bridge as well.
			who.sees, who.silent = p.bootstrap.Addrs[0], i == 0
			client, err := c.dial(testContext(b), who, p.bootstrap)
			if err != nil {
				b.Fatal(err)
			}
			pair[i] = client
		}
		from, to, err := pair[0].circuitTo(testContext(b), pair[1])
		if err != nil {
			b.Fatal(err)
		}
		unlimited(from, to)
		clients = append(clients, pair)
		links = append(links, link{from, to})
	}
	return clients, links
}

func unlimited(streams ...*quicgo.Stream) {
	for _, s := range streams {
		s.SetDeadline(time.Time{})
	}
}

// direct connects a to b past the relay.
func direct(ctx context.Context, a, b *lightClient) (link, error) {
	return dialTo(ctx, a, b, b.transport.Conn.LocalAddr())
}

// dialTo connects a to b, which it reaches at addr.
func dialTo(ctx context.Context, a, b *lightClient, addr net.Addr) (link, error) {
	tlsConf, _ := b.tls.ConfigForPeer("")
	ln, err := b.transport.Listen(tlsConf, lightConfig())
	if err != nil {
		return link{}, err
	}
	defer ln.Close()
	tlsConf, _ = a.tls.ConfigForPeer(b.id)
	conn, err := a.transport.Dial(ctx, addr, tlsConf, lightConfig())
	if err != nil {
		return link{}, err
	}
	accepted, err := ln.Accept(ctx)
	if err != nil {
		return link{}, err
	}
	from, err := conn.OpenStreamSync(ctx)
	if err != nil {
		return link{}, err
	}
	if _, err := from.Write([]byte{0}); err != nil { // or b would know nothing of it
		return link{}, err
	}
	to, err := accepted.AcceptStream(ctx)
	if err != nil {
		return link{}, err
	}
	_, err = io.ReadFull(to, make([]byte, 1))
	return link{from, to}, err
}

// transfer sends so many bytes over each link at once and returns when all are
// there.
func transfer(links []link, bytes int64) error {
	errs := make(chan error, 2*len(links))
	for _, l := range links {
		go func() {
			chunk := make([]byte, 64<<10)
			for left := bytes; left > 0; left -= int64(len(chunk)) {
				if _, err := l.from.Write(chunk); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
		go func() {
			_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(l.to, bytes), make([]byte, 64<<10))
			errs <- err
		}()
	}
	var err error
	for range 2 * len(links) {
		err = errors.Join(err, <-errs)
	}
	return err
}

// carried is one transfer, measured.
type carried struct {
	mibps          float64 // all links together
	relay, clients float64 // CPU seconds per GiB
}

func (p *process) carry(b *testing.B, links []link, total int64) carried {
	b.Helper()
	began, relay, clients := time.Now(), p.cpu(b), ownCPU(b)
	each := total / int64(len(links))
	if err := transfer(links, each); err != nil {
		b.Fatal(err)
	}
	gib := float64(each) * float64(len(links)) / (1 << 30)
	return carried{
		mibps:   gib * 1024 / time.Since(began).Seconds(),
		relay:   (p.cpu(b) - relay).Seconds() / gib,
		clients: (ownCPU(b) - clients).Seconds() / gib,
	}
}

// benchThroughput compares the relay with go-libp2p's defaults, and both with a
// direct transfer between the same clients: one QUIC send and one QUIC receive,
// which is what a relay has to do too.
func benchThroughput(b *testing.B, t *table) {
	t.row("")
	t.row("circuits", "relay", "MiB/s", "relay CPU s/GiB", "clients' CPU s/GiB", "direct MiB/s", "direct CPU s/GiB", "relay CPU / direct's", "relay CPU / clients'")
	for _, n := range []int{1, 8, 64} {
		best := map[string]carried{}
		for _, kind := range []string{"baseline", "product"} {
			b.Run(fmt.Sprint(n, "/", kind), func(b *testing.B) {
				over, past := benchCarry(b, kind, n)
				best[kind] = over
				t.row(n, kind, over.mibps, over.relay, over.clients, past.mibps, past.clients, over.relay/past.clients, over.relay/over.clients)
			})
		}
		if len(best) == 2 {
			t.row(n, "product / baseline", best["product"].mibps/best["baseline"].mibps, best["product"].relay/best["baseline"].relay)
		}
	}
}

// benchCarry measures n circuits and as many direct links between the same
// clients, in turns: of each it returns the median, as the machine's speed drifts.
func benchCarry(b *testing.B, kind string, n int) (over, past carried) {
	const total = 96 << 20
	p := benchRelay(b, kind, "--circuit-bytes=1TiB")
	defer p.kill()
	clients, links := benchCircuits(b, p, n)
	var directs []link
	for _, pair := range clients {
		l, err := direct(testContext(b), pair[0], pair[1])
		if err != nil {
			b.Fatal(err)
		}
		directs = append(directs, l)
	}
	// Once unmeasured: windows open, path MTUs are found.
	p.carry(b, links, total/8)
	p.carry(b, directs, total/8)
	profiled := make(chan struct{})
	go func() {
		defer close(profiled)
		p.profile(b, "profile?seconds=15", fmt.Sprintf("cpu-%s-%d.pb.gz", kind, n))
	}()
	var overs, pasts []carried
	for range 3 {
		overs = append(overs, p.carry(b, links, total))
		pasts = append(pasts, p.carry(b, directs, total))
	}
	<-profiled
	p.profile(b, "heap", fmt.Sprintf("heap-%s-%d.pb.gz", kind, n))
	return median(overs), median(pasts)
}

// median is the one with the median of relay CPU + clients' CPU.
func median(runs []carried) carried {
	slices.SortFunc(runs, func(a, b carried) int { return int(1e6 * (a.relay + a.clients - b.relay - b.clients)) })
	return runs[len(runs)/2]
}

// echo sends what comes on s back until s ends.
func echo(s *quicgo.Stream) { io.Copy(s, s) }

// roundTrips measures n round trips of 64 bytes to an echo at the other end.
func (l link) roundTrips(n int) (took []time.Duration, err error) {
	msg := make([]byte, 64)
	for range n {
		began := time.Now()
		if _, err = l.from.Write(msg); err == nil {
			_, err = io.ReadFull(l.from, msg)
		}
		if err != nil {
			return nil, err
		}
		took = append(took, time.Since(began))
	}
	return took, nil
}

// benchLatency measures what a circuit adds to a round trip, alone and while
// other circuits are carrying all they can.
func benchLatency(b *testing.B, t *table) {
	p := benchRelay(b, "product", "--circuit-bytes=1TiB")
	clients, links := benchCircuits(b, p, 9)
	past, err := direct(testContext(b), clients[0][0], clients[0][1])
	if err != nil {
		b.Fatal(err)
	}
	over := links[0]
	go echo(over.to) // both until the relay is gone
	go echo(past.to)
	t.row("")
	t.row("round trip", "direct p50", "direct p99", "circuit p50", "circuit p99", "added p50", "added p99")
	var idle time.Duration
	for _, load := range []string{"idle", "under load"} {
		ctx, stop := context.WithCancel(context.Background())
		var loading sync.WaitGroup
		if load == "under load" {
			loading.Go(func() {
				for ctx.Err() == nil {
					transfer(links[1:], 4<<20)
				}
			})
		}
		measure := func(l link) []time.Duration {
			took, err := l.roundTrips(2000)
			if err != nil {
				b.Fatal(err)
			}
			return took
		}
		d, c := measure(past), measure(over)
		stop()
		loading.Wait()
		added := percentile(c, 0.99) - percentile(d, 0.99)
		t.row(load, percentile(d, 0.5), percentile(d, 0.99), percentile(c, 0.5), percentile(c, 0.99),
			percentile(c, 0.5)-percentile(d, 0.5), added)
		if load == "idle" {
			idle = added
		} else {
			t.row("added p99, under load / idle", float64(added)/float64(idle))
		}
	}
	p.kill()
}

// benchBandwidth measures how exactly --max-bandwidth is kept, over 30 s, and
// what it costs beside the same traffic from senders that keep to it by themselves.
func benchBandwidth(b *testing.B, t *table) {
	const limit, circuits, seconds = 5 << 20, 8, 30
	t.row("")
	t.row("5 MiB/s over 8 circuits, for 30 s", "MiB/s", "of the figure", "least / most of one circuit", "relay CPU s/GiB")
	for _, kind := range []struct {
		name string
		args []string
		each int64 // bytes per second
	}{
		{"--max-bandwidth=5MiB", []string{fmt.Sprint("--max-bandwidth=", limit)}, 0},
		{"no cap, sent as 16 KiB every 25 ms", nil, limit / circuits},
	} {
		p := benchRelay(b, "product", kind.args...)
		_, links := benchCircuits(b, p, circuits)
		got := make([]atomic.Int64, circuits)
		for i, l := range links {
			go l.flood(&got[i], kind.each) // until the relay is gone
		}
		sum := func() (all, least, most int64) {
			least = math.MaxInt64
			for i := range got {
				n := got[i].Load()
				all, least, most = all+n, min(least, n), max(most, n)
			}
			return all, least, most
		}
		time.Sleep(2 * time.Second)
		before, _, _ := sum()
		began, cpu := time.Now(), p.cpu(b)
		time.Sleep(seconds * time.Second)
		after, least, most := sum()
		took := time.Since(began).Seconds()
		carried := float64(after - before)
		t.row(kind.name, carried/took/(1<<20), carried/took/limit, float64(least)/float64(most), (p.cpu(b)-cpu).Seconds()/carried*(1<<30))
		p.kill()
	}
}

// flood sends what l takes, or with each no more than so many bytes per second,
// and counts what arrives, until l ends.
func (l link) flood(got *atomic.Int64, each int64) {
	go func() {
		chunk := make([]byte, 64<<10)
		if each > 0 {
			chunk = chunk[:16<<10]
		}
		for next := time.Now(); ; {
			if each > 0 {
				next = next.Add(time.Duration(int64(len(chunk)) * int64(time.Second) / each))
				time.Sleep(time.Until(next))
			}
			if _, err := l.from.Write(chunk); err != nil {
				return
			}
		}
	}()
	p := make([]byte, 64<<10)
	for {
		n, err := l.to.Read(p)
		got.Add(int64(n))
		if err != nil {
			return
		}
	}
}

// leavingTime is how long clients that have left are given to be forgotten.
const leavingTime = 5 * time.Minute

// benchClients measures what clients cost, and the DHT's answers with the most of
// them connected.
func benchClients(b *testing.B, t *table) {
	t.row("")
	t.row("clients", "new/s", "CPU ms each", "RSS MiB connected", "+ reserved", "+ serving kad", "KiB each", "peak", "after they left", "within")
	var kad [][]any
	for _, n := range []int{1000, 5000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) { kad = benchClientsOf(b, t, n) })
	}
	t.row("")
	t.row("DHT, with the most clients", "per second", "p50", "p99", "relay CPU ms each")
	for _, row := range kad {
		t.row(row...)
	}
}

func benchClientsOf(b *testing.B, t *table, n int) (kad [][]any) {
	p := benchRelay(b, "product", "--max-clients=12000")
	defer p.kill()
	base := p.rss(b)
	c := newCrowd(b, n)
	who := make([]lightIdentity, n)
	for i := range who {
		who[i] = newLightIdentity(b)
	}
	clients := make([]*lightClient, n)
	began, cpu := time.Now(), p.cpu(b)
	profiled := make(chan struct{})
	go func() {
		defer close(profiled)
		p.profile(b, "profile?seconds=20", fmt.Sprintf("cpu-clients-%d.pb.gz", n))
	}()
	// Who is lost on a machine that is busy with both sides comes again.
	each := func(do func(context.Context, *lightClient) error) func(context.Context, int) error {
		return func(ctx context.Context, i int) (err error) {
			for range 5 {
				if clients[i] == nil || clients[i].Context().Err() != nil {
					if clients[i], err = c.dial(ctx, who[i], p.bootstrap); err != nil {
						continue
					}
				}
				if err = do(ctx, clients[i]); err == nil {
					return nil
				}
			}
			return err
		}
	}
	inParallel(b, n, 32, each(func(context.Context, *lightClient) error { return nil }))
	joined, joinCPU := time.Since(began), p.cpu(b)-cpu
	settle(b, p)
	connected := p.rss(b)
	inParallel(b, n, 32, each(func(ctx context.Context, c *lightClient) error { return c.reserve(ctx) }))
	settle(b, p)
	reserved := p.rss(b)
	// Each with a record of its own, which few share in the field.
	inParallel(b, n, 32, each(func(ctx context.Context, c *lightClient) error {
		if _, err := c.named(ctx, c.id); err != nil {
			return err
		}
		return c.put(ctx, c.id.String())
	}))
	// A minute later, which is when what the crowd's arrival took is given back.
	time.Sleep(givingBack + 5*time.Second)
	<-profiled
	serving := p.rss(b)
	p.profile(b, "heap", fmt.Sprintf("heap-clients-%d.pb.gz", n))
	p.profile(b, "heap?debug=1&gc=1", fmt.Sprintf("heap-clients-%d.txt", n))
	p.profile(b, "goroutine", fmt.Sprintf("goroutines-clients-%d.pb.gz", n))

	kad = benchKad(b, p, clients)
	peak := p.peakRSS(b)
	for _, client := range clients {
		client.CloseWithError(0, "")
	}
	left, within := p.rss(b), time.Duration(0)
	for began := time.Now(); within < leavingTime && left > 120<<20; within = time.Since(began) {
		time.Sleep(time.Second)
		left = p.rss(b)
	}
	p.profile(b, "heap", fmt.Sprintf("heap-left-%d.pb.gz", n))
	p.profile(b, "heap?debug=1&gc=1", fmt.Sprintf("heap-left-%d.txt", n))
	mib := func(n int64) float64 { return float64(n) / (1 << 20) }
	t.row(n, float64(n)/joined.Seconds(), joinCPU.Seconds()*1000/float64(n), mib(connected), mib(reserved), mib(serving),
		float64(serving-base)/float64(n)/1024, mib(peak), mib(left), within.Round(time.Second))
	return kad
}

// inParallel calls do(0) to do(n-1), so many at a time.
func inParallel(t testing.TB, n, workers int, do func(ctx context.Context, i int) error) {
	t.Helper()
	var next, failed int
	var first error
	var mu sync.Mutex
	var working sync.WaitGroup
	for range workers {
		working.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= n {
					return
				}
				ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
				err := do(ctx, i)
				cancel()
				if err != nil {
					mu.Lock()
					failed, first = failed+1, err
					mu.Unlock()
				}
			}
		})
	}
	working.Wait()
	if failed > 0 {
		t.Fatalf("%d of %d failed, such as by: %v", failed, n, first)
	}
}

// settle waits until the relay has nothing more to do.
func settle(t testing.TB, p *process) {
	t.Helper()
	for range 20 {
		before := p.cpu(t)
		time.Sleep(500 * time.Millisecond)
		if p.cpu(t)-before < 200*time.Millisecond {
			return
		}
	}
}

// put stores a record under a key of that name.
func (c *lightClient) put(ctx context.Context, name string) error {
	return c.putValue(ctx, name, `{"device_name":"bench","addresses":["/ip4/192.168.1.10/udp/5001/quic-v1"],"timestamp":1700000000}`)
}

func (c *lightClient) putValue(ctx context.Context, name, value string) error {
	key := []byte(recordPrefix + "syncgroup/" + name)
	req := kadpb.NewMessage(kadpb.Message_PUT_VALUE, key, 0)
	req.Record = rustRecord(key, value, c.id, 60)
	_, err := c.ask(ctx, req)
	return err
}

// benchKad measures DHT requests, 16 at a time, each from another client.
func benchKad(b *testing.B, p *process, clients []*lightClient) (rows [][]any) {
	const requests, workers = 10000, 16
	for _, kind := range []struct {
		name string
		do   func(ctx context.Context, i int) error
	}{
		{"FIND_NODE", func(ctx context.Context, i int) error {
			c := clients[i%len(clients)]
			_, err := c.ask(ctx, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(clients[(i*7919)%len(clients)].id), 0))
			return err
		}},
		{"PUT_VALUE", func(ctx context.Context, i int) error {
			return clients[i%len(clients)].put(ctx, fmt.Sprint("client ", i%len(clients)))
		}},
		{"GET_VALUE", func(ctx context.Context, i int) error {
			key := fmt.Sprint(recordPrefix, "syncgroup/client ", (i*7919)%len(clients))
			_, err := clients[i%len(clients)].ask(ctx, kadpb.NewMessage(kadpb.Message_GET_VALUE, []byte(key), 0))
			return err
		}},
	} {
		took := make([]time.Duration, requests)
		began, cpu := time.Now(), p.cpu(b)
		inParallel(b, requests, workers, func(ctx context.Context, i int) error {
			began := time.Now()
			err := kind.do(ctx, i)
			took[i] = time.Since(began)
			return err
		})
		rows = append(rows, []any{kind.name, requests / time.Since(began).Seconds(), percentile(took, 0.5), percentile(took, 0.99),
			(p.cpu(b) - cpu).Seconds() * 1000 / requests})
	}
	return rows
}
