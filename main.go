// Command privstack-relay is the one server that self-hosting PrivStack users
// run: a libp2p node over which their devices find each other and connect.
//
// It listens on one UDP port (QUIC v1, default 4001) and one TCP port (HTTP,
// default 4002), on IPv4 and IPv6. Over QUIC it is a Kademlia DHT server, in
// which devices of one sync code publish and find one record. It answers with the
// address at which each device was seen, and where two devices cannot reach each
// other it forwards their own QUIC packets between them (a bridge). It relays
// circuits (Circuit Relay v2) for other libp2p software. Over HTTP, GET
// /api/v1/identity tells a client the relay's peer ID, and GET /healthz tells a
// monitor that it is up.
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
	"io/fs"
	"log/slog"
	"math"
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

	// closeTimeout bounds each step of closing after that: the node, then each of
	// the HTTP servers.
	closeTimeout = 5 * time.Second

	// sameRequest is how long a second signal is taken for the first: a program that
	// stops a whole group of processes may send it to each, and to the group too.
	sameRequest = 300 * time.Millisecond

	// maskInterval is how often the relay checks whether something hides its clients.
	maskInterval = 10 * time.Second

	// summaryInterval is how often the counters are logged.
	summaryInterval = time.Hour
)

func main() {
	stopSignals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup has us ignore it
		stopSignals = append(stopSignals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), stopSignals...)
	context.AfterFunc(ctx, func() {
		// A terminal that closes sends SIGHUP twice, and so may a service manager
		// after SIGTERM: that is nobody's second request.
		signal.Ignore(syscall.SIGHUP)
		// Give the second signal back to the runtime: an operator who asks
		// twice wants the process gone, not a tidier goodbye.
		time.AfterFunc(sameRequest, stop)
	})
	dumpOnAbort(os.Stderr)

	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	stderr := newOutlet(os.Stderr, nil)
	if isJournal(os.Stderr, os.Getenv(journalEnv)) {
		io.WriteString(stderr, priorityOf(slog.LevelError))
	}
	fmt.Fprintf(stderr, "privstack-relay: %v\n", err)
	status := 1
	if errors.As(err, new(usageError)) {
		help := "--help"
		if len(os.Args) > 1 && os.Args[1] == "check" {
			help = "check --help"
		}
		fmt.Fprintf(stderr, "Try 'privstack-relay %s'.\n", help)
		status = 2
	}
	stderr.finish()
	os.Exit(status)
}

// run is the whole program short of the process. It parses args, loads the key and
// serves until ctx is done, or checks a relay. nil is a clean stop, a usageError a
// mistyped command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 0 && args[0] == "check" {
		return runCheck(ctx, args[1:], stdout)
	}
	askHealthOnly := len(args) > 0 && args[0] == "healthy"
	if askHealthOnly {
		args = args[1:]
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
	case askHealthOnly:
		if err := askHealth(ctx, cfg.httpPort); err != nil {
			return fmt.Errorf("healthy: %w", err)
		}
		_, err = fmt.Fprintln(stdout, "ok")
		return err
	}

	// A write to a pipe that nobody reads any more then fails, and does not end us.
	signal.Ignore(syscall.SIGPIPE)
	journal := isJournal(stderr, os.Getenv(journalEnv))
	out, lines := newOutlet(stdout, nil), newOutlet(stderr, tellLost(journal))
	defer lines.finish()
	defer out.finish()

	level := slog.LevelInfo
	if cfg.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(newLogHandler(lines, level, journal))
	joinLibraryLogs(log.Handler(), cfg.verbose)

	id, err := loadOrCreateIdentity(cfg.keyFile)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	logIdentity(log, cfg.keyFile, id)

	return serve(ctx, cfg, id, log, func(n node) {
		io.WriteString(out, banner(n.peerID(), n.reachableAddrs(), n.httpPort))
		out.flush()
		n.logStart(log, cfg)
	})
}

// logIdentity says where the key is, and what the operator should mend about its file.
func logIdentity(log *slog.Logger, path string, id identity) {
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
	if id.owner != "" {
		log.Warn("identity key belongs to another user, who can read and change it", "path", path, "owner", id.owner)
	}
	if id.openDirOwner != "" {
		log.Warn("identity key is in a directory that every user can write to, move it to one that is yours alone",
			"path", path, "directory_owner", id.openDirOwner)
	}
	if dir := filepath.Dir(path); endsWithContainer(os.DirFS("/"), dir) {
		log.Warn("this key is gone with the container, and the peer ID with it: give "+dir+" a volume with a name, such as -v privstack:"+dir, "path", path)
	}
}

// node is a relay that serves, and where its HTTP listeners are.
type node struct {
	*relay
	started  time.Time
	httpPort int      // TCP port of the identity endpoint, on all interfaces
	metrics  net.Addr // nil: none are served
}

// banner is all that goes to stdout. Programs look for the line that begins
// "  PeerId:    ".
func banner(peerID string, reachable []string, httpPort int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "privstack-relay %s\n\n", buildVersion())
	fmt.Fprintf(&b, "  PeerId:    %s\n", peerID)
	for _, addr := range reachable {
		fmt.Fprintf(&b, "  Bootstrap: %s/p2p/%s\n", addr, peerID)
	}
	fmt.Fprintf(&b, "  Identity:  http://localhost:%d%s\n\n", httpPort, identityRoute)
	return b.String()
}

// logStart logs what an operator looks for when something is wrong.
func (n node) logStart(log *slog.Logger, cfg config) {
	reachable, lim := n.reachableAddrs(), n.limits
	log.Info("relay ready", "version", buildVersion(), "peer", n.peerID(), "listen", n.socketAddrs(), "addrs", reachable,
		"announced", len(cfg.announce) > 0, "http_port", n.httpPort)
	log.Info("limits", "max_clients", lim.clients, "because_of", lim.why, "max_clients_per_ip", lim.perNetwork, "max_memory_bytes", lim.memory(),
		"circuits", lim.circuits(), "circuit_duration", cfg.circuitDuration, "circuit_bytes", cfg.circuitBytes)
	// Even a relay with very little memory admits 64 clients.
	if lim.available > 0 && lim.memory() > int64(min(lim.available, math.MaxInt64)) {
		log.Warn("max_clients exceeds what memory can hold in the worst case",
			"memory_bytes", lim.available, "max_clients_that_fit", clientsFor(lim.available))
	}
	if cfg.circuitBytes > 0 && cfg.circuitBytes < maxSyncMessage {
		log.Warn("--circuit-bytes is less than the largest sync message has, so a sync over a circuit can break off",
			"circuit_bytes", cfg.circuitBytes, "sync_message_bytes", maxSyncMessage)
	}
	loopback, twice := doubtfulAnnounced(cfg.announce)
	if len(loopback) > 0 {
		log.Warn("--announce names this machine itself, where no other machine can reach it", "addrs", loopback)
	}
	if len(twice) > 0 {
		log.Warn("--announce has the same address more than once", "addrs", twice)
	}
	receiveBuf, sendBuf := n.sockets.buffers()
	switch {
	case receiveBuf == 0 || sendBuf == 0: // unknown
	case receiveBuf >= wantedBuffer && sendBuf >= wantedBuffer:
		log.Info("udp buffers", "receive_bytes", receiveBuf, "send_bytes", sendBuf)
	default:
		log.Warn("udp buffers are small, which costs speed under load"+bufferAdvice(runtime.GOOS, os.DirFS("/")),
			"receive_bytes", receiveBuf, "send_bytes", sendBuf, "wanted_bytes", wantedBuffer)
	}
	n.reach.warnIfHidden()
	if n.metrics != nil {
		log.Info("metrics served", "url", fmt.Sprintf("http://%s/metrics", n.metrics))
		if !n.metrics.(*net.TCPAddr).IP.IsLoopback() {
			log.Warn("metrics are not on loopback: anyone who reaches that address can read them", "addr", n.metrics)
		}
	}
}

// bufferAdvice returns what an operator can do about small UDP buffers, as the end of a
// sentence, where root is the machine's file system. Inside a container the kernel's
// limit cannot be set: the host has it. In a network namespace its file is missing (old
// kernels) or cannot be written (seen with Linux 6.18).
func bufferAdvice(system string, root fs.FS) string {
	if system != "linux" {
		return ""
	}
	where := ", run"
	limit, err := fs.Stat(root, "proc/sys/net/core/rmem_max")
	if err != nil || limit.Mode().Perm()&0o200 == 0 || inContainer(root) {
		where = ", run on the host, outside the container"
	}
	return where + ": sysctl -w net.core.rmem_max=7500000 net.core.wmem_max=7500000, then restart the relay"
}

// explainBind adds to err, which is why port could not be bound, what to do about it.
// network is "TCP" or "UDP", and flag is what chooses the port.
func explainBind(err error, network string, port int, flag string) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, wsaAddrInUse):
		letter := strings.ToLower(network[:1])
		return fmt.Errorf("%w: another program has %s port %d, perhaps another relay (ss -l%snp 'sport = :%d' shows which); stop it, or choose another port with %s",
			err, network, port, letter, port, flag)
	case flag == "--metrics" && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, wsaAddrNotAvail)):
		// The others take no address.
		return fmt.Errorf("%w: this machine does not have that address; choose another one with %s", err, flag)
	case errors.Is(err, fs.ErrPermission) && port > 0 && port < 1024:
		return fmt.Errorf("%w: only root may use a port below 1024, unless the machine allows others: sysctl -w net.ipv4.ip_unprivileged_port_start=%d", err, port)
	}
	return err
}

// What Windows says for EADDRINUSE and EADDRNOTAVAIL, which Go made up there.
// https://learn.microsoft.com/windows/win32/winsock/windows-sockets-error-codes-2
const (
	wsaAddrInUse    = syscall.Errno(10048)
	wsaAddrNotAvail = syscall.Errno(10049)
)

// serve binds all sockets, calls ready once, and serves until ctx is done (a nil
// error) or a part fails. By the time it returns everything is closed.
func serve(ctx context.Context, cfg config, id identity, log *slog.Logger, ready func(node)) (err error) {
	// Listen here and Serve below, so that a taken port is an error run
	// returns and not a line in the log of a process that looks alive.
	ln, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(cfg.httpPort)))
	if err != nil {
		return fmt.Errorf("bind identity endpoint: %w", explainBind(err, "TCP", cfg.httpPort, "--http-port"))
	}
	defer ln.Close() // stopHTTP closes it first; only an early return needs this

	var metricsListener net.Listener
	if cfg.metrics != "" {
		if metricsListener, err = net.Listen("tcp", cfg.metrics); err != nil {
			_, port, _ := net.SplitHostPort(cfg.metrics)
			number, _ := strconv.Atoi(port) // parseFlags has seen that it is a number
			return fmt.Errorf("bind metrics: %w", explainBind(err, "TCP", number, "--metrics"))
		}
		defer metricsListener.Close()
	}

	asked := make(chan os.Signal, 1)
	notifySummary(asked) // before the start, which may wait for DNS: until then the signal ends the process
	defer signal.Stop(asked)

	started := time.Now()
	relay, err := startRelay(cfg, id.key, log)
	if err != nil {
		return explainBind(err, "UDP", cfg.port, "--port")
	}
	// The kernel takes the rest of what was promised, for sockets.
	defer boundMemory(relay.limits.goMemory())()

	n := node{relay: relay, started: started, httpPort: ln.Addr().(*net.TCPAddr).Port}
	api := newAPIHandler(func() identityResponse {
		return identityResponse{
			PeerID:          relay.peerID(),
			Addresses:       relay.listedAddrs(),
			ProtocolVersion: protocolVersion,
			AgentVersion:    agentVersion(),
		}
	})
	srv := newHTTPServer(api, log)
	broken := make(chan error, 2)
	go func() { broken <- fmt.Errorf("serve identity endpoint: %w", srv.Serve(thinListener{ln})) }() // ends with srv, below

	metricsSrv := &http.Server{}
	if metricsListener != nil {
		n.metrics = metricsListener.Addr()
		metricsSrv = newHTTPServer(newMetricsHandler(relay.registry, log), log)
		go func() { broken <- fmt.Errorf("serve metrics: %w", metricsSrv.Serve(thinListener{metricsListener})) }() // ends as srv does
	}

	ready(n)
	manager := findServiceManager(os.Getenv)
	tell := func(state string) {
		if err := manager.tell(state); err != nil {
			log.Warn("service manager not reached", "err", err)
		}
	}
	tell("READY=1")
	signOfLife, stopSigns := manager.signsOfLife()
	defer stopSigns()
	err = n.watch(ctx, log, broken, asked, signOfLife, func() { tell("WATCHDOG=1") })

	log.Info("stopping", relay.counters().attrs()...)
	tell("STOPPING=1")
	api.stopping.Store(true)
	// ctx is already done, so it cannot be the budget for the goodbye.
	ctx = context.WithoutCancel(ctx)
	if left := relay.drain(ctx, drainTimeout); left > 0 {
		log.Warn("closing open circuits", "circuits", left)
	}
	// HTTP goes last: until then a monitor is answered 503, not refused.
	err = errors.Join(err,
		closeStep(ctx, "node", func(context.Context) error { return relay.close() }),
		closeStep(ctx, "metrics", func(ctx context.Context) error { return stopHTTP(ctx, metricsSrv) }),
		closeStep(ctx, "identity endpoint", func(ctx context.Context) error { return stopHTTP(ctx, srv) }))
	log.Info("stopped", relay.counters().attrs()...)
	return err
}

// watch logs summaries, each time that one is asked for and each hour, warns if something
// hides where clients are, and calls alive for each sign of life that is due. It returns
// nil when ctx is done, or the error of the part that broke.
func (n node) watch(ctx context.Context, log *slog.Logger, broken <-chan error, asked <-chan os.Signal, signOfLife <-chan time.Time, alive func()) error {
	hourly, masks := time.NewTicker(summaryInterval), time.NewTicker(maskInterval)
	defer hourly.Stop()
	defer masks.Stop()
	masked := false
	for {
		select {
		case <-hourly.C:
			n.logSummary(log)
		case <-asked:
			n.logSummary(log)
		case <-masks.C:
			addr, clients := n.maskedBy()
			if addr.IsValid() && !masked { // warn once, until clients from elsewhere have come
				log.Warn("all clients come from one private address: something in front of the relay hides where they are, such as a container's port forwarding, "+
					"so devices are told useless addresses of each other and all clients share one address's limit: see docs/container.md", "addr", addr, "clients", clients)
			}
			masked = addr.IsValid() || masked && clients == 0
		case <-signOfLife:
			// This line is not reached while the loop hangs, and not passed while a
			// lock does: the watchdog then ends a process that only looks alive.
			n.takeLocks()
			alive()
		case <-ctx.Done():
			return nil
		case err := <-broken:
			return err
		case err := <-n.broken:
			return err
		}
	}
}

func (n node) logSummary(log *slog.Logger) {
	about := []any{"uptime", time.Since(n.started).Round(time.Second), "memory_bytes", memoryInUse()}
	log.Info("summary", append(about, n.counters().attrs()...)...)
}

// closeStep runs end for closeTimeout at most. It leaves behind one that hangs, which
// ends with the process.
func closeStep(ctx context.Context, what string, end func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- end(ctx) }()
	select {
	case err := <-ended:
		if err != nil {
			return fmt.Errorf("close %s: %w", what, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("close %s: still not done after %v", what, closeTimeout)
	}
}
