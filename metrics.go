package main

// The metrics, off unless --metrics is given: what counters.go counts, beside
// what go-libp2p, the Go runtime and the operating system tell of this process.
// No label holds a peer or an address.

import (
	"log/slog"
	"net/http"
	"runtime"
	"time"

	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	circuit "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// maxScrapes is how many are answered at once; others get a 503.
const maxScrapes = 4

// newMetricsHandler answers GET /metrics from r, which has a registry.
func newMetricsHandler(r *relay, log *slog.Logger) http.Handler {
	mux := new(http.ServeMux)
	mux.Handle("GET /metrics", promhttp.HandlerFor(r.registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		MaxRequestsInFlight: maxScrapes,
	}))
	return mux
}

// newRegistry holds ours, and room for go-libp2p's. It is asked for its metrics
// once r runs.
func newRegistry(r *relay) *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		relayCollector{r},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return registry
}

// libp2pMetrics are the options with which parts of the host count: into the
// registry if there is one, and refusals always.
func (r *relay) libp2pMetrics() (bus []eventbus.Option, network []swarm.Option, resources []rcmgr.Option) {
	resources = []rcmgr.Option{rcmgr.WithMetrics(&r.tally)}
	if r.registry == nil {
		return nil, nil, append(resources, rcmgr.WithMetricsDisabled())
	}
	rcmgr.MustRegisterWith(r.registry)
	bus = []eventbus.Option{eventbus.WithMetricsTracer(eventbus.NewMetricsTracer(eventbus.WithRegisterer(r.registry)))}
	network = []swarm.Option{swarm.WithMetricsTracer(swarm.NewMetricsTracer(swarm.WithRegisterer(r.registry)))}
	return bus, network, resources
}

// circuitTracer is told by the circuit relay what it does.
func (r *relay) circuitTracer() circuit.MetricsTracer {
	if r.registry == nil {
		return r.circuits
	}
	return circuitTracers{r.circuits, circuit.NewMetricsTracer(circuit.WithRegisterer(r.registry))}
}

// circuitTracers tells each of them.
type circuitTracers []circuit.MetricsTracer

func (ts circuitTracers) RelayStatus(enabled bool) {
	for _, t := range ts {
		t.RelayStatus(enabled)
	}
}

func (ts circuitTracers) ConnectionOpened() {
	for _, t := range ts {
		t.ConnectionOpened()
	}
}

func (ts circuitTracers) ConnectionClosed(d time.Duration) {
	for _, t := range ts {
		t.ConnectionClosed(d)
	}
}

func (ts circuitTracers) ConnectionRequestHandled(status circuitpb.Status) {
	for _, t := range ts {
		t.ConnectionRequestHandled(status)
	}
}

func (ts circuitTracers) ReservationAllowed(renewal bool) {
	for _, t := range ts {
		t.ReservationAllowed(renewal)
	}
}

func (ts circuitTracers) ReservationClosed(n int) {
	for _, t := range ts {
		t.ReservationClosed(n)
	}
}

func (ts circuitTracers) ReservationRequestHandled(status circuitpb.Status) {
	for _, t := range ts {
		t.ReservationRequestHandled(status)
	}
}

func (ts circuitTracers) BytesTransferred(n int) {
	for _, t := range ts {
		t.BytesTransferred(n)
	}
}

// relayCollector reads the relay's counters when somebody asks.
type relayCollector struct{ *relay }

// Describe tells nothing: what is collected is the same each time.
func (relayCollector) Describe(chan<- *prometheus.Desc) {}

func (r relayCollector) Collect(out chan<- prometheus.Metric) {
	metric := func(kind prometheus.ValueType, name, help string, value float64, labels ...string) {
		var names, values []string
		for i := 0; i < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		desc := prometheus.NewDesc("privstack_relay_"+name, help, names, nil)
		out <- prometheus.MustNewConstMetric(desc, kind, value, values...)
	}
	const counter, gauge = prometheus.CounterValue, prometheus.GaugeValue

	c := r.counters()
	metric(counter, "peers_served_total", "Distinct peers that have connected since the start.", float64(c.peersServed))
	for _, kind := range []struct {
		name  string
		conns int
		bytes int64
	}{{"circuit", c.relayedConnections - c.bridged, c.relayedBytes - c.bridgedBytes}, {"bridge", c.bridged, c.bridgedBytes}} {
		metric(counter, "relayed_connections_total", "Circuits and bridges established since the start, by kind.", float64(kind.conns), "kind", kind.name)
		metric(counter, "relayed_bytes_total", "Bytes that circuits and bridges carried, both directions together, by kind.", float64(kind.bytes), "kind", kind.name)
	}
	for i, n := range c.requests {
		metric(counter, "requests_total", "Requests to the DHT, and for reservations and circuits, by type.", float64(n), "type", request(i).String())
	}
	for i, n := range c.refused {
		metric(counter, "refusals_total", "What was refused, by reason.", float64(n), "reason", refusal(i).String())
	}
	metric(gauge, "clients", "Distinct peers connected.", float64(c.clients))
	metric(gauge, "connections", "Connections, those in the handshake too.", float64(c.connections))
	metric(gauge, "max_clients", "The most connections at once (--max-clients).", float64(r.limits.clients))
	metric(gauge, "reservations", "Reservations held.", float64(c.reservations))
	metric(gauge, "circuits", "Circuits open, or being opened.", float64(c.circuits))
	metric(gauge, "bridges", "Bridges open.", float64(c.bridges))
	metric(gauge, "dht_records", "DHT records held.", float64(c.records))
	metric(gauge, "dht_record_bytes", "Bytes of the DHT records held, with what keeping them costs.", float64(c.recordBytes))
	metric(gauge, "build_info", "1, and in the labels what was built.", 1, "version", buildVersion(), "goversion", runtime.Version())
}
