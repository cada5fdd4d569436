package main

// The HTTP endpoint: the answer that the deployed clients parse, and hostile clients
// that try to hold it up.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func newTestAPI() *apiHandler {
	return newAPIHandler(func() identityResponse {
		return identityResponse{
			PeerID:          oldPeerID,
			Addresses:       []string{"/ip4/0.0.0.0/udp/4001/quic-v1", "/ip6/::/udp/4001/quic-v1"},
			ProtocolVersion: "/privstack/relay/1.0.0",
			AgentVersion:    "privstack-relay/0.1.0",
		}
	})
}

// The deployed clients parse exactly this text.
func TestIdentityEndpointIsTheOldOne(t *testing.T) {
	srv := httptest.NewServer(newTestAPI())
	defer srv.Close()
	resp, err := http.Get(srv.URL + "/api/v1/identity")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"peer_id":"12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV",` +
		`"addresses":["/ip4/0.0.0.0/udp/4001/quic-v1","/ip6/::/udp/4001/quic-v1"],` +
		`"protocol_version":"/privstack/relay/1.0.0","agent_version":"privstack-relay/0.1.0"}`
	if string(body) != want {
		t.Errorf("body = %s\nwant   %s", body, want)
	}
	if got := resp.Header.Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type = %q, want application/json", got)
	}
}

func TestRoutesAndMethods(t *testing.T) {
	api := newTestAPI()
	tests := []struct {
		method, path string
		status       int
		body         bool
	}{
		{"GET", "/api/v1/identity", 200, true},
		{"HEAD", "/api/v1/identity", 200, false},
		{"POST", "/api/v1/identity", 405, true},
		{"DELETE", "/api/v1/identity", 405, true},
		{"GET", "/", 404, true},
		{"GET", "/api/v1/identity/../../../etc/passwd", 404, true},
		{"GET", "/api/v1/identity/more", 404, true},
		{"GET", "/healthz", 200, true},
		// What reverse proxies make of a path when they take a prefix off.
		{"GET", "//api/v1/identity", 200, true},
		{"GET", "/api//v1///identity", 200, true},
		{"GET", "/api/v1/identity/", 200, true},
		{"GET", "//api/v1/identity//", 200, true},
		{"POST", "//api/v1/identity/", 405, true},
		{"GET", "//healthz/", 200, true},
		{"GET", "//", 404, true},
		{"HEAD", "/healthz", 200, false},
		{"PUT", "/healthz", 405, true},
	}
	srv := httptest.NewServer(api)
	defer srv.Close()
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	for _, tt := range tests {
		req, err := http.NewRequest(tt.method, srv.URL+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tt.status || (len(body) > 0) != tt.body {
			t.Errorf("%s %s = %d with %d bytes, want %d, body %v", tt.method, tt.path, resp.StatusCode, len(body), tt.status, tt.body)
		}
	}
}

// An operator who opens the bare address learns what answers there.
func TestRootSaysWhatThisIs(t *testing.T) {
	w := httptest.NewRecorder()
	newTestAPI().ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	for _, want := range []string{"PrivStack relay", identityRoute, healthRoute} {
		if body := w.Body.String(); !strings.Contains(body, want) || strings.Count(body, "\n") != 1 {
			t.Errorf("/ says %q, want one line with %s", body, want)
		}
	}
}

// A web page that a user happens to visit must not learn which relay is in reach.
func TestWebPagesCannotReadAnswers(t *testing.T) {
	for _, method := range []string{"GET", "OPTIONS"} {
		req := httptest.NewRequest(method, identityRoute, nil)
		req.Header.Set("Origin", "https://example.org")
		req.Header.Set("Access-Control-Request-Method", "GET")
		w := httptest.NewRecorder()
		newTestAPI().ServeHTTP(w, req)
		for name := range w.Header() {
			if strings.HasPrefix(name, "Access-Control-") {
				t.Errorf("%s: the answer has the header %s", method, name)
			}
		}
	}
}

// A monitor sees that the relay is about to stop.
func TestHealthTurnsOnceStopping(t *testing.T) {
	api := newTestAPI()
	for _, tt := range []struct {
		stopping bool
		status   int
		body     string
	}{{false, 200, "ok"}, {true, 503, "stopping"}} {
		api.stopping.Store(tt.stopping)
		w := httptest.NewRecorder()
		api.ServeHTTP(w, httptest.NewRequest("GET", "/healthz", nil))
		if w.Code != tt.status || w.Body.String() != tt.body {
			t.Errorf("stopping = %v: %d %q, want %d %q", tt.stopping, w.Code, w.Body, tt.status, tt.body)
		}
	}
}

// A client that makes many requests over one connection is not taken for one that sends too
// many lines, and the latter is told so.
func TestLinesOfRequestsAreCounted(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := newHTTPServer(newTestAPI(), slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- srv.Serve(thinListener{ln}) }()
	defer func() {
		srv.Close()
		<-served
	}()
	request := func(lines int) string { // the empty one is not counted
		return "GET " + identityRoute + " HTTP/1.1\r\nHost: relay\r\n" + strings.Repeat("X-A: b\r\n", lines-2) + "\r\n"
	}
	post := "POST " + identityRoute + " HTTP/1.1\r\nHost: relay\r\nContent-Length: 100\r\n\r\n" + strings.Repeat("\n", 100)
	for _, tt := range []struct {
		name     string
		requests []string
		status   []int
	}{
		{"many requests of the most lines", slices.Repeat([]string{request(maxHTTPLines)}, 5), []int{200, 200, 200, 200, 200}},
		{"a line too many", []string{request(3), request(maxHTTPLines + 1)}, []int{200, 400}},
		{"a body of empty lines", []string{post, request(maxHTTPLines)}, []int{405, 200}},
		{"a line too many after a body", []string{post, request(maxHTTPLines + 1)}, []int{405, 400}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(testTimeout))
			answers := bufio.NewReader(c)
			for i, r := range tt.requests {
				if _, err := io.WriteString(c, r); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(answers, nil)
				if err != nil {
					t.Fatalf("request %d: %v", i, err)
				}
				io.Copy(io.Discard, resp.Body)
				if resp.StatusCode != tt.status[i] {
					t.Errorf("request %d: status %d, want %d", i, resp.StatusCode, tt.status[i])
				}
			}
		})
	}
}

// A network that asks without end waits, and is refused after a while. All others are
// answered at once.
func TestRequestsOfANetworkAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newTestAPI()
		greedy, other := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1")
		for api.budget(other) == api.budget(greedy) {
			other = other.Next()
		}
		ask := func(from netip.Addr) (status int, took time.Duration) {
			req, w, began := httptest.NewRequest("GET", identityRoute, nil), httptest.NewRecorder(), time.Now()
			req.RemoteAddr = netip.AddrPortFrom(from, 1234).String()
			api.ServeHTTP(w, req)
			return w.Code, time.Since(began)
		}
		expect := func(from netip.Addr, wantStatus int, want time.Duration) {
			t.Helper()
			if status, took := ask(from); status != wantStatus || took.Round(time.Millisecond) != want {
				t.Errorf("%v: status %d after %v, want %d after %v", from, status, took, wantStatus, want)
			}
		}
		for range httpBurst {
			expect(greedy, 200, 0)
		}
		var asking sync.WaitGroup
		for range httpRate * int(httpPatience/time.Second) {
			asking.Go(func() {
				if status, took := ask(greedy); status != 200 || took == 0 {
					t.Errorf("status %d after %v, want 200 after a while", status, took)
				}
			})
		}
		synctest.Wait()
		expect(other, 200, 0)
		expect(netip.MustParseAddr("127.0.0.1"), 200, 0)
		expect(greedy, 429, httpPatience)
		asking.Wait()
	})
}

// A slow or hostile client costs others nothing: the relay ends its connections and
// answers everyone else meanwhile.
func TestHostileHTTPClientsHoldNobodyUp(t *testing.T) {
	t.Parallel()
	p := start(t)
	addr := strings.TrimPrefix(p.http, "http://")
	const request = "GET " + identityRoute + " HTTP/1.1\r\nHost: relay\r\n"
	var elsewhere net.IP
	if runtime.GOOS == "linux" { // where all of 127.0.0.0/8 is loopback
		elsewhere = net.IPv4(127, 0, 0, 2)
	}

	for _, hostile := range []struct {
		name  string
		conns int
		sends string // at once
		then  string // again and again
		every time.Duration
		says  string // how the relay's answer begins, if there is one
	}{
		{name: "idle connections", conns: 10_000},
		{name: "slow-loris", conns: 1000, sends: request, then: "X-A: b\r\n", every: 100 * time.Millisecond},
		{name: "slow after a request", conns: 1000, sends: request + "\r\n", then: "G", every: 100 * time.Millisecond, says: "HTTP/1.1 200 OK"},
		{name: "endless headers", conns: 20, sends: request, then: strings.Repeat("X-A: b\r\n", 1000), says: "HTTP/1.1 400 "},
		{name: "a header of 1 MiB", conns: 100, sends: request + "X-A: " + strings.Repeat("b", 1<<20), says: "HTTP/1.1 431 "},
		{name: "endless body", conns: 20, sends: "POST " + identityRoute + " HTTP/1.1\r\nHost: relay\r\nContent-Length: 99999999999\r\n\r\n", then: strings.Repeat("body", 1000), says: "HTTP/1.1 405 "},
		{name: "endless chunks", conns: 20, sends: request + "Transfer-Encoding: chunked\r\n\r\n", then: strings.Repeat("1\r\na\r\n", 1000), says: "HTTP/1.1 200 OK"},
		{name: "two lengths", conns: 100, sends: request + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n", says: "HTTP/1.1 400 "},
		{name: "TLS", conns: 100, sends: "\x16\x03\x01\x00\x02\x01\x00\r\n\r\n", says: "HTTP/1.1 400 "},
		{name: "no HTTP", conns: 100, sends: "\x00\xff\r\n\r\n", says: "HTTP/1.1 400 "},
		// A client that asks and never reads fills its own window.
		{name: "never reads", conns: 20, then: strings.Repeat(request+"\r\n", 100)},
	} {
		t.Run(hostile.name, func(t *testing.T) {
			over, cancel := context.WithCancel(context.Background())
			honest := make(chan []time.Duration)
			go func() { honest <- askUntil(t, over, p.http, elsewhere) }()

			var conns sync.WaitGroup
			for range hostile.conns {
				c, err := net.Dial("tcp", addr)
				if errors.Is(err, syscall.EMFILE) {
					t.Logf("%v: fewer than %d connections (ulimit -n)", err, hostile.conns)
					break
				}
				if err != nil {
					t.Error(err)
					break
				}
				conns.Go(func() {
					defer c.Close()
					c.SetDeadline(time.Now().Add(2 * testTimeout))
					writing := make(chan error, 1)
					go func() { writing <- keepSending(c, hostile.sends, hostile.then, hostile.every) }()
					if hostile.name == "never reads" {
						if err := <-writing; errors.Is(err, os.ErrDeadlineExceeded) {
							t.Error("the relay keeps a connection that never reads")
						}
						return
					}
					said := make([]byte, len(hostile.says))
					n, err := io.ReadFull(c, said)
					// The relay does not read everything, so its reset may overtake its answer.
					if string(said[:n]) != hostile.says && !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("the relay answers %q, %v, want %q", said[:n], err, hostile.says)
					}
					if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
						t.Error("the relay keeps the connection")
					}
				})
			}
			conns.Wait()
			cancel()
			took := <-honest
			if runtime.GOOS == "linux" {
				t.Logf("the relay has %d KiB of resident memory", p.rss(t)>>10)
			}
			if len(took) > 0 {
				t.Logf("%d connections; meanwhile %d honest requests were answered, p50 %v, p99 %v",
					hostile.conns, len(took), percentile(took, 0.5), percentile(took, 0.99))
			}
		})
	}
}

// keepSending writes first once, then again repeatedly until the connection ends.
func keepSending(c net.Conn, first, again string, every time.Duration) error {
	if _, err := io.WriteString(c, first); err != nil || again == "" {
		return err
	}
	tick := time.NewTicker(max(every, 1))
	defer tick.Stop()
	for {
		if _, err := io.WriteString(c, again); err != nil {
			return err
		}
		if every > 0 {
			<-tick.C
		}
	}
}

// askUntil asks for the identity until over is done, each time as a new client and at
// least once, from that address unless it is nil. It returns how long each answer took.
func askUntil(t *testing.T, over context.Context, base string, from net.IP) (took []time.Duration) {
	dialer := &net.Dialer{}
	if from != nil {
		dialer.LocalAddr = &net.TCPAddr{IP: from}
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dialer.DialContext}, Timeout: testTimeout}
	for {
		began := time.Now()
		resp, err := client.Get(base + identityRoute)
		if err != nil {
			t.Errorf("an honest client: %v", err)
			return took
		}
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 {
			t.Errorf("an honest client: status %d, %v", resp.StatusCode, err)
		}
		took = append(took, time.Since(began))
		if over.Err() != nil {
			return took
		}
	}
}

// Whoever opens many connections loses his own, however old and slow those of others are.
func TestHTTPConnectionsOfOthersStay(t *testing.T) {
	h := httpConns{by: make(map[netip.Prefix][]net.Conn)}
	open := func(a, b byte) *fakeConn {
		c := &fakeConn{from: &net.TCPAddr{IP: net.IPv4(11, 0, a, b)}}
		h.add(c)
		return c
	}
	honest := open(0, 1)
	var hostile []*fakeConn
	for range 3 * maxHTTPConns {
		hostile = append(hostile, open(0, 2))
	}
	second := open(0, 1)
	for i, c := range hostile {
		if want := i < 2*maxHTTPConns+2; c.closed != want {
			t.Fatalf("connection %d of one address: closed %v, want %v", i, c.closed, want)
		}
	}
	for i := range 3 * maxHTTPConns { // one each of many addresses
		h.remove(open(byte(1+i/250), byte(i%250)))
	}
	if honest.closed || second.closed {
		t.Error("an honest connection was closed for others")
	}
	if h.all > maxHTTPConns || len(h.by) > 2 {
		t.Errorf("%d connections of %d networks are left", h.all, len(h.by))
	}
}

type fakeConn struct {
	net.Conn
	from   net.Addr
	closed bool
}

func (c *fakeConn) RemoteAddr() net.Addr { return c.from }
func (c *fakeConn) Close() error         { c.closed = true; return nil }

// A client that opens connections to keep others out loses its own.
func TestOldestHTTPConnectionGivesWay(t *testing.T) {
	srv := newHTTPServer(newTestAPI(), slog.New(slog.DiscardHandler))
	srv.ReadHeaderTimeout, srv.ReadTimeout = 0, 0 // so that only the bound ends a connection
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go srv.Serve(ln) // until srv.Close
	defer srv.Close()

	const over = 10
	conns := make([]net.Conn, maxHTTPConns+over)
	for i := range conns {
		if conns[i], err = net.Dial("tcp", ln.Addr().String()); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
		conns[i].SetDeadline(time.Now().Add(testTimeout))
	}
	for i, c := range conns[:over] {
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("connection %d of %d: read error = %v, want %v", i, len(conns), err, io.EOF)
		}
	}
	for _, i := range []int{over, len(conns) - 1} {
		fmt.Fprintf(conns[i], "GET /healthz HTTP/1.1\r\nHost: r\r\n\r\n")
		if resp, err := http.ReadResponse(bufio.NewReader(conns[i]), nil); err != nil || resp.StatusCode != 200 {
			t.Errorf("connection %d of %d is not served: %v", i, len(conns), err)
		}
	}
}
