// Command privstack-relay is the one server that self-hosting PrivStack users
// run: a libp2p node over which their devices find each other and connect.
//
// It listens on one UDP port (QUIC v1, default 4001) and one TCP port (HTTP,
// default 4002), on IPv4 and IPv6. Over QUIC it is a Kademlia DHT server, in
// which devices of one sync code publish and find one record; it answers with
// the address under which each device was seen, which is what lets two homes
// behind NATs reach each other; and it relays (Circuit Relay v2) for those that
// still cannot. Over HTTP, GET /api/v1/identity tells a client the relay's peer
// ID, and GET /healthz tells a monitor that it is up.
//
// The only file is the private key (--identity): it is the peer ID that clients
// know, so keep a copy. Everything else is in memory and gone with the process.
// Users' data passes through encrypted end to end and is never stored.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// defaultVersion is what a build that knows no release says it is: the version
// the deployed clients were written against.
const defaultVersion = "0.1.0"

const (
	// drainTimeout is how long open circuits may go on after the signal to
	// stop, so that a sync in its last seconds is not cut.
	drainTimeout = 5 * time.Second

	// closeTimeout bounds each of the closing steps after that.
	closeTimeout = 5 * time.Second

	// summaryInterval is how often the counters are logged.
	summaryInterval = time.Hour
)

const usage = `privstack-relay - find and reach your PrivStack devices through your own server

Usage: privstack-relay [flags]
       privstack-relay check RELAY   test a running relay, from anywhere
                                     (see check --help)

  -p, --port PORT               UDP port for QUIC (default 4001)
      --http-port PORT          TCP port for the identity endpoint (default 4002)
  -i, --identity FILE           private key; made on first start
                                (default relay-identity.key)
      --announce ADDR           address under which clients reach this relay: an IP
                                address, a DNS name or a multiaddr; repeatable
                                (default: the addresses of this machine)
      --bootstrap MULTIADDR     another relay to join, with its /p2p ID; repeatable
      --circuit-duration TIME   longest life of one relayed connection, such as 30m;
                                0 = unlimited (default 1h)
      --circuit-bytes SIZE      most bytes one relayed connection carries each way,
                                such as 512MiB; 0 = unlimited (default 1GiB)
      --max-bandwidth SIZE      most bytes per second that all circuits carry
                                together, such as 5MiB; 0 = unlimited (default 0)
      --max-clients N           most clients at once; 0 = what memory allows
                                (default 0)
      --max-clients-per-ip N    most clients from one IPv4 address or IPv6 /56
                                (default 256)
      --metrics ADDR            serve metrics for Prometheus at http://ADDR/metrics, such
                                as 127.0.0.1:4003 (default: off)
  -v, --verbose                 log every peer and every step
      --version                 print the version
  -h, --help                    print this help
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// Give the second signal back to the runtime: an operator who asks
	// twice wants the process gone, not a tidier goodbye.
	context.AfterFunc(ctx, stop)

	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	fmt.Fprintf(os.Stderr, "privstack-relay: %v\n", err)
	if errors.As(err, new(usageError)) {
		fmt.Fprintln(os.Stderr, "Try 'privstack-relay --help'.")
		os.Exit(2)
	}
	os.Exit(1)
}

// config is what an operator can choose, checked by parseFlags and then left alone.
type config struct {
	// port is the UDP port for QUIC on all interfaces. 0 takes any free
	// port, which is how the tests run side by side.
	port int

	// httpPort is the TCP port of the HTTP endpoint on all interfaces. 0
	// takes any free port.
	httpPort int

	// identityPath is the file holding the private key. If there is none,
	// one is created there, readable by its owner only.
	identityPath string

	// announce are the addresses that clients can reach, as the operator
	// wrote them; parseAnnounce accepts each. Empty: the machine's own.
	announce []string

	// bootstrap are the addresses of other relays, as the operator wrote them;
	// parseBootstrap accepts each. Empty: this one is alone.
	bootstrap []string

	// circuitDuration and circuitBytes (each way) cap one relayed
	// connection. 0 is unlimited.
	circuitDuration time.Duration
	circuitBytes    int64

	// maxBandwidth caps what all circuits carry together, both ways, in bytes
	// per second. 0 is unlimited.
	maxBandwidth int64

	// maxClients is the most clients connected at once. 0 derives it from
	// the memory that the process may use.
	maxClients int

	// maxClientsPerIP is the most clients, at least 1, connected from one
	// IPv4 address or IPv6 /56.
	maxClientsPerIP int

	// metrics is the host and TCP port of the metrics listener; port 0 takes
	// any free one. Empty: there is none.
	metrics string

	// verbose logs every peer and libp2p's own debug lines.
	verbose bool
}

// usageError is a mistake on the command line: exit status 2.
type usageError struct{ msg string }

func (e usageError) Error() string { return e.msg }

// errHelp and errVersion are asked for, not failures: run answers on stdout.
var (
	errHelp    = flag.ErrHelp
	errVersion = errors.New("version requested")
)

// parseFlags reads the command line. Its error is a usageError, errHelp or
// errVersion.
func parseFlags(args []string) (config, error) {
	cfg := config{circuitBytes: 1 << 30}
	fs := flag.NewFlagSet("privstack-relay", flag.ContinueOnError)
	fs.SetOutput(io.Discard) // run and main say what went wrong, once
	for _, name := range []string{"port", "p"} {
		fs.IntVar(&cfg.port, name, 4001, "")
	}
	fs.IntVar(&cfg.httpPort, "http-port", 4002, "")
	for _, name := range []string{"identity", "i"} {
		fs.StringVar(&cfg.identityPath, name, "relay-identity.key", "")
	}
	fs.Func("announce", "", func(s string) error {
		if _, err := parseAnnounce(s, 1); err != nil {
			return err
		}
		cfg.announce = append(cfg.announce, s)
		return nil
	})
	fs.Func("bootstrap", "", func(s string) error {
		if _, err := parseBootstrap(s); err != nil {
			return err
		}
		cfg.bootstrap = append(cfg.bootstrap, s)
		return nil
	})
	fs.DurationVar(&cfg.circuitDuration, "circuit-duration", time.Hour, "")
	fs.Func("circuit-bytes", "", func(s string) (err error) {
		cfg.circuitBytes, err = parseSize(s)
		return err
	})
	fs.Func("max-bandwidth", "", func(s string) (err error) {
		cfg.maxBandwidth, err = parseSize(s)
		return err
	})
	fs.IntVar(&cfg.maxClients, "max-clients", 0, "")
	fs.IntVar(&cfg.maxClientsPerIP, "max-clients-per-ip", 256, "")
	fs.Func("metrics", "", func(s string) error {
		_, port, err := net.SplitHostPort(s)
		if _, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil {
			return errors.New("write a host and a port, such as 127.0.0.1:4003")
		}
		cfg.metrics = s
		return nil
	})
	for _, name := range []string{"verbose", "v"} {
		fs.BoolVar(&cfg.verbose, name, false, "")
	}
	showVersion := fs.Bool("version", false, "")

	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return config{}, errHelp
	case err != nil:
		return config{}, usageError{err.Error()}
	case *showVersion:
		return config{}, errVersion
	case fs.NArg() > 0:
		return config{}, usageError{fmt.Sprintf("unexpected argument %q", fs.Arg(0))}
	}

	for _, port := range []struct {
		flag  string
		value int
	}{{"--port", cfg.port}, {"--http-port", cfg.httpPort}} {
		if port.value < 0 || port.value > 65535 {
			return config{}, usageError{fmt.Sprintf("%s %d is not between 0 and 65535", port.flag, port.value)}
		}
	}
	switch {
	case cfg.identityPath == "":
		return config{}, usageError{"--identity needs a file name"}
	case len(cfg.announce) > maxAnnounce:
		return config{}, usageError{fmt.Sprintf("--announce given %d times, at most %d fit into a reservation", len(cfg.announce), maxAnnounce)}
	case len(cfg.bootstrap) > maxBootstrap:
		return config{}, usageError{fmt.Sprintf("--bootstrap given %d times, at most %d fit into an answer", len(cfg.bootstrap), maxBootstrap)}
	case cfg.circuitDuration < 0:
		return config{}, usageError{fmt.Sprintf("--circuit-duration %v is negative", cfg.circuitDuration)}
	case cfg.circuitDuration > 0 && cfg.circuitDuration < time.Second:
		// Peers are told whole seconds, in which this would be 0: unlimited.
		return config{}, usageError{fmt.Sprintf("--circuit-duration %v is under one second", cfg.circuitDuration)}
	case cfg.circuitDuration > maxCircuitDuration:
		return config{}, usageError{fmt.Sprintf("--circuit-duration %v is above %v, use 0 for unlimited", cfg.circuitDuration, maxCircuitDuration)}
	case cfg.maxBandwidth > 0 && cfg.maxBandwidth < minBandwidth:
		return config{}, usageError{fmt.Sprintf("--max-bandwidth %d is under %d bytes per second, use 0 for unlimited", cfg.maxBandwidth, minBandwidth)}
	case cfg.maxClients < 0 || cfg.maxClients > maxMaxClients:
		return config{}, usageError{fmt.Sprintf("--max-clients %d is not between 0 and %d", cfg.maxClients, maxMaxClients)}
	case cfg.maxClientsPerIP < 1:
		return config{}, usageError{fmt.Sprintf("--max-clients-per-ip %d is below 1", cfg.maxClientsPerIP)}
	}
	return cfg, nil
}

// parseSize reads a number of bytes: 1048576, 512KiB, 1.5GiB, 10MB (powers of
// ten). Upper and lower case are the same.
func parseSize(s string) (int64, error) {
	number, factor := strings.ToLower(strings.TrimSpace(s)), 1.0
	for i, unit := range []string{"k", "m", "g", "t"} {
		if n, ok := strings.CutSuffix(number, unit+"ib"); ok {
			number, factor = n, math.Pow(1024, float64(i+1))
			break
		}
		if n, ok := strings.CutSuffix(number, unit+"b"); ok {
			number, factor = n, math.Pow(1000, float64(i+1))
			break
		}
	}
	number = strings.TrimSuffix(number, "b")
	n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if err != nil || math.IsNaN(n) {
		return 0, fmt.Errorf("not a size, write 512MiB or 1GiB")
	}
	n *= factor
	if n > 0 && n < 1 { // which as 0 would mean unlimited
		return 0, fmt.Errorf("less than a byte, write 512MiB or 1GiB")
	}
	if n < 0 || n >= 1<<62 {
		return 0, fmt.Errorf("not between 0 and 4EiB")
	}
	return int64(n), nil
}

// run is the whole program short of the process: it parses args, loads the key
// and serves until ctx is done, or checks a relay. nil is a clean stop, a usageError a mistyped
// command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 0 && args[0] == "check" {
		return runCheck(ctx, args[1:], stdout)
	}
	cfg, err := parseFlags(args)
	switch {
	case errors.Is(err, errHelp):
		_, err = io.WriteString(stdout, usage)
		return err
	case errors.Is(err, errVersion):
		_, err = fmt.Fprintln(stdout, "privstack-relay", buildVersion())
		return err
	case err != nil:
		return err
	}

	level := slog.LevelInfo
	if cfg.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	joinLibraryLogs(log.Handler(), cfg.verbose)

	id, err := loadOrCreateIdentity(cfg.identityPath)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	path := cfg.identityPath
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	if id.created {
		log.Info("new identity key made, keep a copy", "path", path, "mode", id.mode)
	} else {
		log.Info("identity key read", "path", path, "mode", id.mode)
	}
	if id.exposed {
		log.Warn("identity key is readable by other users, run: chmod 600 "+path, "path", path)
	}

	return serve(ctx, cfg, id, log, func(s served) {
		io.WriteString(stdout, s.banner())
		s.log(log, cfg)
	})
}

// served is what a started relay can say of itself.
type served struct {
	peerID     string
	bound      []string // multiaddrs of the sockets
	reachable  []string // multiaddrs that clients are told, without /p2p
	hidden     bool     // the latter are all private, and of the operator's choice none
	httpPort   int      // TCP port of the identity endpoint, on all interfaces
	metrics    net.Addr // nil: none are served
	limits     limits
	receiveBuf int // granted to each UDP socket, in bytes; 0 is unknown
	sendBuf    int
}

// banner is what goes to stdout, and all that does. Programs look for the line
// that begins "  PeerId:    ".
func (s served) banner() string {
	var b strings.Builder
	fmt.Fprintf(&b, "privstack-relay %s\n\n", buildVersion())
	fmt.Fprintf(&b, "  PeerId:    %s\n", s.peerID)
	for _, addr := range s.reachable {
		fmt.Fprintf(&b, "  Bootstrap: %s/p2p/%s\n", addr, s.peerID)
	}
	fmt.Fprintf(&b, "  Identity:  http://localhost:%d%s\n\n", s.httpPort, identityPath)
	return b.String()
}

// log tells what an operator looks for when something is wrong.
func (s served) log(log *slog.Logger, cfg config) {
	log.Info("relay ready", "version", buildVersion(), "peer", s.peerID, "listen", s.bound, "addrs", s.reachable,
		"announced", len(cfg.announce) > 0, "http_port", s.httpPort)
	log.Info("limits", "max_clients", s.limits.clients, "because_of", s.limits.why, "max_clients_per_ip", s.limits.perNetwork, "max_memory_bytes", s.limits.memory(),
		"circuits", s.limits.circuits(), "circuit_duration", cfg.circuitDuration, "circuit_bytes", cfg.circuitBytes)
	if most := s.limits.available; most > 0 && s.limits.clients > clientsFor(most) {
		log.Warn("that many clients could take more memory than there is, if they did their worst",
			"memory_bytes", most, "max_clients_that_fit", clientsFor(most))
	}
	switch {
	case s.receiveBuf == 0 || s.sendBuf == 0:
	case s.receiveBuf >= wantedBuffer && s.sendBuf >= wantedBuffer:
		log.Info("udp buffers", "receive_bytes", s.receiveBuf, "send_bytes", s.sendBuf)
	case runtime.GOOS == "linux":
		log.Warn("udp buffers are small, which costs speed under load, run: "+
			"sysctl -w net.core.rmem_max=7500000 net.core.wmem_max=7500000, then restart the relay",
			"receive_bytes", s.receiveBuf, "send_bytes", s.sendBuf, "wanted_bytes", wantedBuffer)
	default:
		log.Warn("udp buffers are small, which costs speed under load",
			"receive_bytes", s.receiveBuf, "send_bytes", s.sendBuf, "wanted_bytes", wantedBuffer)
	}
	if s.hidden {
		log.Warn("this machine knows no public address of its own, so only clients in its own network can use the relay: "+
			"say where others reach it with --announce", "addrs", s.reachable)
	}
	if s.metrics != nil {
		log.Info("metrics served", "url", fmt.Sprintf("http://%s/metrics", s.metrics))
		if !s.metrics.(*net.TCPAddr).IP.IsLoopback() {
			log.Warn("metrics are not on loopback: whoever reaches that address can read them", "addr", s.metrics)
		}
	}
}

// serve binds all sockets, calls ready once, and serves until ctx is done (a
// nil error) or a part fails. By the time it returns everything is closed.
func serve(ctx context.Context, cfg config, id identity, log *slog.Logger, ready func(served)) (err error) {
	// Listen here and Serve below, so that a taken port is an error run
	// returns and not a line in the log of a process that looks alive.
	ln, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(cfg.httpPort)))
	if err != nil {
		return fmt.Errorf("bind identity endpoint: %w", err)
	}
	defer ln.Close() // again after srv.Shutdown: an error then means nothing

	var metricsListener net.Listener
	if cfg.metrics != "" {
		if metricsListener, err = net.Listen("tcp", cfg.metrics); err != nil {
			return fmt.Errorf("bind metrics: %w", err)
		}
		defer metricsListener.Close()
	}

	started := time.Now()
	relay, err := startRelay(cfg, id.key, log)
	if err != nil {
		return err
	}

	// The rest is the kernel's, for sockets.
	defer boundMemory(relay.limits.goMemory())()

	api := newAPIHandler(identityResponse{
		PeerID:          relay.peerID(),
		Addresses:       relay.listedAddrs(),
		ProtocolVersion: protocolVersion,
		AgentVersion:    agentVersion(),
	})
	srv := newHTTPServer(api, log)
	failed := make(chan error, 2)
	go func() { failed <- fmt.Errorf("serve identity endpoint: %w", srv.Serve(ln)) }() // ends with srv, below

	up := served{
		peerID:    relay.peerID(),
		bound:     relay.boundAddrs(),
		reachable: relay.reachableAddrs(),
		hidden:    relay.hidden(),
		httpPort:  ln.Addr().(*net.TCPAddr).Port,
		limits:    relay.limits,
	}
	up.receiveBuf, up.sendBuf = relay.sockets.buffers()
	metricsSrv := &http.Server{}
	if metricsListener != nil {
		up.metrics = metricsListener.Addr()
		metricsSrv = newHTTPServer(newMetricsHandler(relay, log), log)
		go func() { failed <- fmt.Errorf("serve metrics: %w", metricsSrv.Serve(metricsListener)) }() // ends as srv does
	}

	asked := make(chan os.Signal, 1)
	notifySummary(asked)
	defer signal.Stop(asked)
	hourly := time.NewTicker(summaryInterval)
	defer hourly.Stop()
	logSummary := func() {
		about := []any{"uptime", time.Since(started).Round(time.Second), "memory_bytes", memoryInUse()}
		log.Info("summary", append(about, relay.counters().attrs()...)...)
	}
	ready(up)
	manager := findServiceManager(os.Getenv)
	tell := func(state string) {
		if err := manager.tell(state); err != nil {
			log.Warn("service manager not reached", "err", err)
		}
	}
	tell("READY=1")
	signOfLife, stopSigns := manager.signsOfLife()
	defer stopSigns()

	for running := true; running; {
		select {
		case <-hourly.C:
			logSummary()
		case <-asked:
			logSummary()
		case <-signOfLife:
			// Not reached while this loop hangs, nor passed while a lock does:
			// the watchdog then ends what only looks alive.
			relay.takeLocks()
			tell("WATCHDOG=1")
		case <-ctx.Done():
			running = false
		case err = <-failed:
			running = false
		case err = <-relay.failed:
			running = false
		}
	}

	log.Info("stopping", relay.counters().attrs()...)
	tell("STOPPING=1")
	api.stopping.Store(true)
	// ctx is already done, so it cannot be the budget for the goodbye.
	ctx = context.WithoutCancel(ctx)
	within := func(d time.Duration, f func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		return f(ctx)
	}
	if left := relay.drain(ctx, drainTimeout); left > 0 {
		log.Warn("closing open circuits", "circuits", left)
	}
	// HTTP goes last: until then a monitor is answered 503, not refused.
	err = errors.Join(err,
		relay.close(),
		within(closeTimeout, metricsSrv.Shutdown),
		within(closeTimeout, srv.Shutdown))
	log.Info("stopped", relay.counters().attrs()...)
	return err
}

// memoryInUse is how many bytes the Go runtime has of the system: most of what
// the process takes.
func memoryInUse() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64() - s[1].Value.Uint64()
}

// pseudoVersion matches what the Go toolchain makes up for a commit that is no
// release. https://go.dev/ref/mod#pseudo-versions
var pseudoVersion = regexp.MustCompile(`\d{14}-[0-9a-f]{12}`)

// buildVersion is the version of this build without a leading v: what the Go
// toolchain stamped (the tag of a release, of a clean clone at it and of `go
// install …@v1.2.3`, a pseudo-version for any other commit), else defaultVersion.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && strings.HasPrefix(info.Main.Version, "v") {
		return info.Main.Version[1:]
	}
	return defaultVersion
}

// agentVersion is what peers and the identity endpoint are told: the release,
// and defaultVersion for a build that is none.
func agentVersion() string {
	v := buildVersion()
	if pseudoVersion.MatchString(v) || strings.Contains(v, "+") {
		v = defaultVersion
	}
	return "privstack-relay/" + v
}
