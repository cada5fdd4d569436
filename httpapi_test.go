package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

func newTestAPI() *apiHandler {
	return newAPIHandler(identityResponse{
		PeerID:          oldPeerID,
		Addresses:       []string{"/ip4/0.0.0.0/udp/4001/quic-v1", "/ip6/::/udp/4001/quic-v1"},
		ProtocolVersion: "/privstack/relay/1.0.0",
		AgentVersion:    "privstack-relay/0.1.0",
	})
}

// The deployed clients parse exactly this.
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
		{"GET", "/api/v1/identity/", 404, true},
		{"GET", "/", 404, true},
		{"GET", "/api/v1/identity/../../../etc/passwd", 307, true},
		{"GET", "/healthz", 200, true},
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

// A monitor sees the end coming.
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
