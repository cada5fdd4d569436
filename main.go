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
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// drainTimeout is how long open circuits may go on after the signal to
	// stop, so that a sync in its last seconds is not cut.
	drainTimeout = 5 * time.Second

	// closeTimeout bounds each of the closing steps after that.
	closeTimeout = 5 * time.Second

	// summaryInterval is how often the counters are logged.
	summaryInterval = time.Hour
)

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
