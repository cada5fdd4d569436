package main

// The metrics, off unless --metrics is given: what counters.go counts, and what
// go-libp2p, the Go runtime and the operating system say about this process. No
// label holds a peer or an address.

import (
	"log/slog"
	"net/http"
	"runtime"

	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// maxScrapes is how many scrapes are answered at once; others get a 503.
const maxScrapes = 4

// newMetricsHandler answers GET /metrics from registry.
func newMetricsHandler(registry *prometheus.Registry, log *slog.Logger) http.Handler {
	mux := new(http.ServeMux)
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		MaxRequestsInFlight: maxScrapes,
	}))
	return mux
}

// newRegistry returns a registry of what read counts, to which go-libp2p's parts
// can add theirs. It calls read at each scrape.
func newRegistry(read func() counters) *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		relayCollector{read},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return registry
}

// libp2pMetrics returns the options with which parts of a host count: refusals into
// t and, unless registry is nil, everything else into that.
func libp2pMetrics(registry *prometheus.Registry, t *tally) (bus []eventbus.Option, network []swarm.Option, resources []rcmgr.Option) {
	resources = []rcmgr.Option{rcmgr.WithMetrics(t)}
	if registry == nil {
		return nil, nil, append(resources, rcmgr.WithMetricsDisabled())
	}
	rcmgr.MustRegisterWith(registry)
	bus = []eventbus.Option{eventbus.WithMetricsTracer(eventbus.NewMetricsTracer(eventbus.WithRegisterer(registry)))}
	network = []swarm.Option{swarm.WithMetricsTracer(swarm.NewMetricsTracer(swarm.WithRegisterer(registry)))}
	return bus, network, resources
}

// relayCollector reads the relay's counters at each scrape.
type relayCollector struct{ read func() counters }

// Describe describes nothing, which makes relayCollector an unchecked collector:
// the registry does not look for two metrics of one name before a scrape.
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

	c := r.read()
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
		metric(counter, "refusals_total", "Refusals, by reason.", float64(n), "reason", refusal(i).String())
	}
	metric(gauge, "clients", "Distinct peers connected.", float64(c.clients))
	metric(gauge, "connections", "Connections, including those in the handshake.", float64(c.connections))
	metric(gauge, "max_clients", "The most connections at once (--max-clients).", float64(c.maxClients))
	metric(gauge, "reservations", "Reservations held.", float64(c.reservations))
	metric(gauge, "circuits", "Circuits open, or being opened.", float64(c.circuits))
	metric(gauge, "bridges", "Bridges open.", float64(c.bridges))
	metric(gauge, "dht_records", "DHT records held.", float64(c.records))
	metric(gauge, "dht_record_bytes", "Bytes that the DHT records take, including what keeping them costs.", float64(c.recordBytes))
	metric(gauge, "other_relays", "Other relays that are known.", float64(c.relays))
	metric(gauge, "other_relays_connected", "Other relays that are connected.", float64(c.relaysConnected))
	metric(gauge, "build_info", "Always 1; the labels say what was built.", 1, "version", buildVersion(), "goversion", runtime.Version())
}
