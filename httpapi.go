package main

// The HTTP endpoint: it tells clients who this relay is, and monitors whether the relay
// is up. It is given plain values and knows nothing of libp2p.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

const (
	// httpBurst sets how many requests one network can make at once, and httpRate how
	// many per second after that. A request costs 30 to 50 µs of CPU. Even a reverse proxy
	// on another machine, which asks for all clients, stays far below that: a client asks
	// once, when it is set up. A request beyond that waits. If it would have to wait for
	// longer than httpPatience, it is refused after that time, so that who asks does not
	// ask again at once.
	httpBurst    = 1024
	httpRate     = 256
	httpPatience = 3 * time.Second

	// httpBudgets sets how many budgets there are. They take 80 KiB. A hash of the network
	// chooses one, so that a flood from many networks takes no more memory. (Those in
	// budgets.go go by connections, of which there are only so many.)
	httpBudgets = 1024

	// maxHTTPLines limits the lines of a request's header. Browsers send about 15, and a
	// proxy adds ten.
	maxHTTPLines = 64
)

// apiHandler answers every HTTP request.
type apiHandler struct {
	http.ServeMux

	// stopping turns /healthz to 503, so that a load balancer or monitor
	// looks elsewhere while open circuits finish.
	stopping atomic.Bool

	seed    maphash.Seed
	budgets [httpBudgets]*rate.Limiter // chosen by budget
}

// healthRoute is the path at which monitors ask whether the relay is up.
const healthRoute = "/healthz"

// newAPIHandler answers with what identity returns at that moment. The mux adds HEAD
// to each GET, and answers 404 and 405 by itself.
//
// There is no CORS header, so no web page can read the answers: no client runs in a
// browser, and a page must not find out which relay is in its visitor's network.
func newAPIHandler(identity func() identityResponse) *apiHandler {
	h := &apiHandler{seed: maphash.MakeSeed()}
	for i := range h.budgets {
		h.budgets[i] = rate.NewLimiter(httpRate, httpBurst)
	}
	h.HandleFunc("GET "+identityRoute, func(w http.ResponseWriter, _ *http.Request) {
		body, err := json.Marshal(identity())
		if err != nil {
			panic(err) // a struct of strings always marshals
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(body)
	})
	// 404, as from the old relay, but with a hint where to look.
	h.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "This is a PrivStack relay. Ask "+identityRoute+" who it is, and "+healthRoute+" whether it is up.", http.StatusNotFound)
	})
	h.HandleFunc("GET "+healthRoute, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		if h.stopping.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			io.WriteString(w, "stopping")
			return
		}
		io.WriteString(w, "ok")
	})
	return h
}

// ServeHTTP treats doubled slashes in the path as one, and ignores a slash at its end. A
// reverse proxy that strips a prefix often leaves such slashes. The mux would answer the
// former with a redirect, which leads out of the prefix, and the latter with 404.
func (h *apiHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !h.wait(r) {
		w.Header().Set("Connection", "close")
		http.Error(w, "Too many requests from your network.", http.StatusTooManyRequests)
		return
	}
	if clean := path.Clean("/" + r.URL.Path); clean != r.URL.Path {
		r = r.Clone(r.Context())
		r.URL.Path, r.URL.RawPath = clean, ""
	}
	h.ServeMux.ServeHTTP(w, r)
}

// wait waits until the client's network may make another request, and returns false if
// that would take too long. Without it, 64 connections with one request after another took
// a core, and DHT requests of others a second instead of a millisecond.
func (h *apiHandler) wait(r *http.Request) bool {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	addr := from.Addr().Unmap()
	if addr.IsLoopback() { // a reverse proxy: its limits count
		return true
	}
	turn := h.budget(addr).Reserve()
	wait := turn.Delay()
	late := wait > httpPatience
	if late {
		turn.Cancel()
		wait = httpPatience
	}
	if wait > 0 {
		select {
		case <-time.After(wait):
		case <-r.Context().Done():
		}
	}
	return !late
}

// budget returns the budget of requests of the network that addr is in.
func (h *apiHandler) budget(addr netip.Addr) *rate.Limiter {
	return h.budgets[maphash.Comparable(h.seed, networkOf(addr))%httpBudgets]
}

// newHTTPServer serves h within bounds that a slow or hostile client cannot exceed.
// A request is one short line and a few headers, so seconds and kilobytes are
// generous.
func newHTTPServer(h http.Handler, log *slog.Logger) *http.Server {
	conns := httpConns{by: make(map[netip.Prefix][]net.Conn)}
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      5 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    4 << 10, // net/http adds 4 KiB of slack
		ConnState: func(c net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				conns.add(c)
			case http.StateClosed:
				conns.remove(c)
			}
		},
		// net/http's complaints are about one connection each: debug.
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// thinListener accepts connections whose requests have few lines. net/http bounds only the
// bytes of a header, and keeps its lines in a map: 8 KiB of short lines took 120 KiB.
type thinListener struct{ net.Listener }

func (l thinListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &thinConn{Conn: c}, nil
}

// thinConn is one of those connections. net/http reads from it in one goroutine at a time.
type thinConn struct {
	net.Conn
	lines int  // since the last empty one, which ends a header
	begun bool // the line that is being read is not empty
}

var errTooManyLines = fmt.Errorf("request has more than %d lines", maxHTTPLines)

// Read returns an error in place of the first line that is too many. It does not know where a
// body ends, so it counts the lines of bodies, too. The endpoint has no use for a body.
func (c *thinConn) Read(p []byte) (int, error) {
	if c.lines > maxHTTPLines {
		return 0, errTooManyLines
	}
	n, err := c.Conn.Read(p)
	for i, b := range p[:n] {
		switch {
		case b == '\n' && !c.begun:
			c.lines = 0
		case b == '\n':
			c.lines, c.begun = c.lines+1, false
		case b != '\r':
			c.begun = true
		}
		if c.lines > maxHTTPLines {
			return i, nil
		}
	}
	return n, err
}

// CloseWrite is what net/http looks for, so that a client can read why it was refused
// before its connection is reset.
func (c *thinConn) CloseWrite() error {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		return tcp.CloseWrite()
	}
	return nil
}

// answerInProgress is how long a request that has begun may take when the relay stops. An
// answer is one small packet.
const answerInProgress = time.Second

// stopHTTP lets requests that have begun end, for answerInProgress at most, and closes
// srv. Shutdown alone waits 5 s for a connection that has asked nothing yet, so that
// anyone who has just connected could make a stop late, and look like a failure.
func stopHTTP(ctx context.Context, srv *http.Server) error {
	ctx, cancel := context.WithTimeout(ctx, answerInProgress)
	defer cancel()
	err := srv.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return srv.Close()
	}
	return err
}

// httpConns are the open connections, oldest first, of each network. Beyond maxHTTPConns
// the oldest connection of a network that has more than others is closed, so someone who
// opens many to keep others out closes his own.
type httpConns struct {
	mu  sync.Mutex
	all int
	by  map[netip.Prefix][]net.Conn
}

func (h *httpConns) add(c net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	network := whoseConn(c)
	h.by[network] = append(h.by[network], c)
	h.all++
	if h.all <= maxHTTPConns {
		return
	}
	if len(h.by[network]) <= maxHTTPConns/len(h.by) {
		for other, conns := range h.by {
			if len(conns) > len(h.by[network]) {
				network = other
			}
		}
	}
	oldest := h.by[network][0]
	h.drop(network, 0)
	oldest.Close()
}

// remove forgets a connection, unless add has.
func (h *httpConns) remove(c net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	network := whoseConn(c)
	if i := slices.Index(h.by[network], c); i >= 0 {
		h.drop(network, i)
	}
}

// whoseConn returns the network from which c comes. All that are not TCP are in one.
func whoseConn(c net.Conn) netip.Prefix {
	addr, _ := c.RemoteAddr().(*net.TCPAddr) // nil is no address
	return networkOf(addr.AddrPort().Addr().Unmap())
}

func (h *httpConns) drop(network netip.Prefix, i int) {
	h.all--
	h.by[network] = slices.Delete(h.by[network], i, i+1)
	if len(h.by[network]) == 0 {
		delete(h.by, network)
	}
}

// healthTimeout bounds one request to healthRoute, over each address family.
const healthTimeout = 3 * time.Second

// askHealth asks the relay on this machine with that --http-port whether it is up, and
// returns nil if it is.
func askHealth(ctx context.Context, port int) error {
	if port == 0 {
		return errors.New("0 is no port to ask at: give the relay's --http-port")
	}
	err := askHealthAt(ctx, net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil && askHealthAt(ctx, net.JoinHostPort("::1", strconv.Itoa(port))) == nil {
		return nil // a machine that has only IPv6
	}
	return err
}

func askHealthAt(ctx context.Context, addr string) error {
	// Not the default transport, which obeys HTTP_PROXY.
	client := http.Client{Timeout: healthTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+healthRoute, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if e := (*url.Error)(nil); errors.As(err, &e) {
		err = e.Err // without the URL: its cause names the address
	}
	switch {
	case os.IsTimeout(err):
		return fmt.Errorf("%s does not answer within %v: the relay hangs", addr, healthTimeout)
	case err != nil:
		return fmt.Errorf("%w: the relay is not running, or it has another --http-port", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		says, _ := io.ReadAll(io.LimitReader(resp.Body, 100))
		return fmt.Errorf("%s answers %d: %.100q", addr, resp.StatusCode, says)
	}
	return nil
}
