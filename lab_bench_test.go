package main

// How much one relay carries. The relay is a process of its own, so that its CPU and
// memory are counted apart from the clients':
//
//	go test -run '^$' -bench Capacity -benchtime 1x -timeout 1h .
//
// prints one table. It needs Linux, for /proc. Nothing is asserted, because figures of
// one machine are no test: compare ratios of one run. docs/performance.md says what the
// figures mean, what dominates them, and what was tried without gain.
//
// BENCH_PROFILE=dir writes CPU and heap profiles of the relay into that directory.

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

// benchRelayEnv tells the test binary that it is a relay: "product" is this program with
// a profiler, "baseline" is go-libp2p's relay with its default resources.
const benchRelayEnv = "PRIVSTACK_BENCH_RELAY"

// runBenchRelay runs such a relay until the process is killed.
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
	io.WriteString(os.Stdout, banner(h.ID().String(), strs(h.Addrs()), 0))
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	return nil
}

// benchRelay starts a relay: the built binary, or the test binary where that has no
// profiler or is not what kind says.
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

// profiles returns the URL of the profiles of a relay that runs in the test binary.
func (p *process) profiles() string {
	_, rest, _ := strings.Cut(p.stdout, "Profiles: ")
	url, _, _ := strings.Cut(rest, "\n")
	return url
}

// profile writes a profile of the relay ("heap", "profile?seconds=5") into the directory
// BENCH_PROFILE, if that is set.
func (p *process) profile(b *testing.B, name, file string) {
	b.Helper()
	dir := os.Getenv("BENCH_PROFILE")
	if dir == "" {
		return
	}
	resp, err := http.Get(p.profiles() + "/" + name)
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

// table collects the figures.
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

// BenchmarkCapacity prints the table. Its parts can be run one by one, such as -bench
// Capacity/throughput.
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
		{"steady", benchSteady},
	} {
		b.Run(part.name, func(b *testing.B) { part.run(b, t) })
	}
	fmt.Printf("\n%s\n", t)
}

// benchStart measures the time from the start of the process to its first DHT answer.
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

// benchCircuits opens n circuits. Each is between two clients that have no other circuit
// and share no socket.
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

// direct connects a to b without the relay.
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
	if _, err := from.Write([]byte{0}); err != nil { // without a byte b would not see the stream
		return link{}, err
	}
	to, err := accepted.AcceptStream(ctx)
	if err != nil {
		return link{}, err
	}
	_, err = io.ReadFull(to, make([]byte, 1))
	return link{from, to}, err
}

// transfer sends that many bytes over each link, over all links at once, and returns when
// all have arrived.
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

// carried is what one transfer took.
type carried struct {
	mibps          float64 // all links together
	relay, clients float64 // CPU seconds per GiB
}

// carry sends total bytes over the links and measures it.
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

// benchThroughput compares the relay with go-libp2p's defaults, and both with a direct
// transfer between the same clients. That takes one QUIC send and one QUIC receive, as a
// relay does.
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

// benchCarry measures n circuits and n direct links between the same clients, in turns,
// because the machine's speed drifts. It returns the median of each.
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
	// The first transfers are not measured: windows grow, and path MTUs are found.
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

// median returns the run with the median CPU time of relay and clients together.
func median(runs []carried) carried {
	slices.SortFunc(runs, func(a, b carried) int { return int(1e6 * (a.relay + a.clients - b.relay - b.clients)) })
	return runs[len(runs)/2]
}

// echo sends back what comes on s until s ends.
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

// benchLatency measures how much a circuit adds to a round trip, on an idle relay and while
// other circuits carry all they can.
func benchLatency(b *testing.B, t *table) {
	p := benchRelay(b, "product", "--circuit-bytes=1TiB")
	clients, links := benchCircuits(b, p, 9)
	past, err := direct(testContext(b), clients[0][0], clients[0][1])
	if err != nil {
		b.Fatal(err)
	}
	over := links[0]
	go echo(over.to) // both end with the relay
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

// benchBandwidth measures how exactly --max-bandwidth is kept over 30 s, and what it costs
// compared with senders that keep to the same rate by themselves.
func benchBandwidth(b *testing.B, t *table) {
	const limit, circuits, seconds = 5 << 20, 8, 30
	t.row("")
	t.row("5 MiB/s over 8 circuits, for 30 s", "MiB/s", "of the cap", "least / most of one circuit", "relay CPU s/GiB")
	for _, kind := range []struct {
		name string
		args []string
		each int64 // bytes per second
	}{
		{"--max-bandwidth=5MiB", []string{fmt.Sprint("--max-bandwidth=", limit)}, 0},
		{"no cap, senders write 16 KiB every 25 ms", nil, limit / circuits},
	} {
		p := benchRelay(b, "product", kind.args...)
		_, links := benchCircuits(b, p, circuits)
		got := make([]atomic.Int64, circuits)
		for i, l := range links {
			go l.flood(&got[i], kind.each) // ends with the relay
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

// leavingTime is how long the relay has to give back the memory of clients that left.
const leavingTime = 5 * time.Minute

// benchClients measures what clients cost, and how fast the DHT answers with the most of
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
	// A client that loses its connection, because the machine is busy with both sides,
	// connects again.
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
	// Each has its own record. In the field, a few devices share one.
	inParallel(b, n, 32, each(func(ctx context.Context, c *lightClient) error {
		if _, err := c.named(ctx, c.id); err != nil {
			return err
		}
		return c.put(ctx, c.id.String())
	}))
	// A minute later the relay has given back what the crowd's arrival took.
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

// settle waits until the relay is idle.
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

// benchSteady measures what clients cost once they are connected: first if they only keep
// their connections, then if each looks for its group every 30 s, as the deployed ones do.
// Their looks are spread over the 30 s, so requests hardly ever share a packet, a system
// call or a turn of the scheduler, as they do in benchKad.
func benchSteady(b *testing.B, t *table) {
	t.row("")
	t.row("clients", "relay CPU µs a second for each: connected", "and looking", "relay CPU µs per request", "looks failed")
	for _, n := range []int{2000, 8000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) { benchSteadyOf(b, t, n) })
	}
}

func benchSteadyOf(b *testing.B, t *table, n int) {
	const period, requests = 30 * time.Second, 3
	p := benchRelay(b, "product", "--max-clients=12000")
	defer p.kill()
	c := newCrowd(b, n)
	clients := make([]*lightClient, n)
	inParallel(b, n, 32, func(ctx context.Context, i int) (err error) {
		clients[i], err = c.newcomer(ctx, p.bootstrap)
		return err
	})
	settle(b, p)
	each := func(do func()) (share float64) { // of a core, for one client
		began, cpu := time.Now(), p.cpu(b)
		do()
		return (p.cpu(b) - cpu).Seconds() / time.Since(began).Seconds() / float64(n)
	}
	connected := each(func() { time.Sleep(period) })
	var failed atomic.Int64
	looking := each(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*period)
		defer cancel()
		var looks sync.WaitGroup
		began := time.Now()
		for i, client := range clients {
			time.Sleep(time.Until(began.Add(time.Duration(i) * period / time.Duration(n))))
			looks.Go(func() {
				if client.look(ctx, fmt.Sprint("group ", i/3)) != nil {
					failed.Add(1)
				}
			})
		}
		looks.Wait()
	})
	t.row(n, connected*1e6, looking*1e6, (looking-connected)*1e6*period.Seconds()/requests, failed.Load())
}

// look does what a device does every 30 s: it stores its group's record, before which it
// asks who is close to it, and looks for that record at the same moment.
func (c *lightClient) look(ctx context.Context, group string) error {
	key := []byte(recordPrefix + "syncgroup/" + group)
	got := make(chan error, 1)
	go func() {
		_, err := c.ask(ctx, getMessage(key))
		got <- err
	}()
	_, err := c.ask(ctx, findMessage(key))
	return errors.Join(err, c.put(ctx, group), <-got)
}

// benchKad measures DHT requests, 16 at a time, each by another client.
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
