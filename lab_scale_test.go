package main

// How many devices several relays carry, computed from what one relay and one device were
// measured to cost:
//
//	go test -run '^$' -bench Scale -benchtime 1x .
//
// prints the tables of docs/scale.md, which says what they mean. It opens no socket and
// takes a few seconds. The seed is fixed, so each run prints the same.

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What was measured: docs/scale.md says how, and on which machine.
const (
	// scaleConnected is the relay's CPU for a connected client, per second, and
	// scaleRequest for one of its requests: BenchmarkCapacity/steady with 2 000 clients.
	// With 8 000 they are a third and a half lower.
	scaleConnected = 30 * time.Microsecond
	scaleRequest   = 355 * time.Microsecond

	// scaleNewcomer is the relay's CPU for a new connection: BenchmarkNewcomers.
	scaleNewcomer = 800 * time.Microsecond

	// A device makes scaleTickRequests to each of its relays in scaleTick, and
	// scaleFirstRequests more in the first minute after it has connected:
	// BenchmarkRustTraffic, in groups of five.
	scaleTick          = 30 * time.Second
	scaleTickRequests  = 3.3
	scaleFirstRequests = 10

	// In scaleTick the relay sends so many bytes to each client, and so many for each bridge
	// between two devices that have nothing to sync, all headers included. It receives as
	// much: BenchmarkRustTraffic, the bridge in groups of five.
	scaleTickBytes   = 2400
	scaleBridgeBytes = 9800

	// scaleBridge is the relay's CPU for such a bridge, per second: as much as for a client
	// that looks for its group (BenchmarkCapacity/steady). In one run of
	// BenchmarkRustTraffic it was 0.6 times that in groups of five, and 1.0 times in pairs.
	scaleBridge = 66 * time.Microsecond

	// scaleSyncCPU is the relay's CPU for each GiB that bridges carry: BenchmarkBridge with
	// 64 flows.
	scaleSyncCPU = 1550 * time.Millisecond
)

// What is assumed.
const (
	// scalePhones of all devices are phones. They count as connected all the time, but
	// each connects anew after scaleReturn. The others are always on.
	scalePhones = 0.5
	scaleReturn = 20 * time.Minute

	// Groups have 2 to scaleGroup devices. Each size is as frequent. The devices of a
	// group know the same relay.
	scaleGroup = 5

	// scaleBridged of all pairs need a bridge, and each device sends scaleSync bytes a day
	// to each other one of its group.
	scaleBridged = 0.5
	scaleSync    = 5 << 20

	// scaleBusy is how much of the CPU may be busy on average. The rest is for devices
	// that come back all at once.
	scaleBusy = 0.5
)

// scaleMachine is a machine as providers sell it: memory in bytes, of which the unit lets
// the relay use 85 %, and how many bytes it may send in 30 days.
type scaleMachine struct {
	name                 string
	cores, memory, month float64
}

var scaleMachines = []scaleMachine{
	{"1 core, 1 GiB, 1 TB", 1, 1 << 30, 1e12},
	{"2 cores, 4 GiB, 4 TB", 2, 4 << 30, 4e12},
	{"2 cores, 4 GiB, 20 TB", 2, 4 << 30, 20e12},
}

var scaleRelays = []int{1, 2, 3, 4, 8, 16, 64}

// BenchmarkScale prints the tables.
func BenchmarkScale(b *testing.B) {
	for _, t := range scaleTables() {
		fmt.Printf("\n%s", t)
	}
}

// What operators plan by is what the simulation says, with the limits as they are now.
func TestScaleTablesAreInDocs(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("other processors may round otherwise")
	}
	page := pages(t)["docs/scale.md"]
	for _, table := range scaleTables() {
		if !strings.Contains(page, "\n\n"+string(table)+"\n") {
			t.Errorf("docs/scale.md does not have this table:\n%s", table)
		}
	}
}

func scaleTables() (tables []pageTable) {
	rng := rand.New(rand.NewPCG(19, 5)) // any seed would do
	for _, fill := range []func(*rand.Rand, *pageTable){scaleShares, scaleCosts, scaleAlone, scaleLoads, scaleFits, scaleEvenness, scaleMoves} {
		var t pageTable
		fill(rng, &t)
		tables = append(tables, t)
	}
	return tables
}

// pageTable is a table as pages have them.
type pageTable string

func (t *pageTable) row(cells ...any) {
	for _, c := range cells {
		if f, ok := c.(float64); ok {
			c = fmt.Sprintf("%.2f", f)
		}
		*t += pageTable(fmt.Sprintf("| %v ", c))
	}
	if *t += "|\n"; strings.Count(string(*t), "\n") == 1 {
		*t += pageTable(strings.Repeat("|---", len(cells)) + "|\n")
	}
}

// number writes a number with two digits, as the pages do: 0.58, 12, 4 400.
func number(f float64) string {
	round := math.Pow10(int(math.Floor(math.Log10(f))) - 1)
	if f = math.Round(f/round) * round; f < 10 {
		return strconv.FormatFloat(f, 'g', 2, 64)
	}
	digits := strconv.Itoa(int(math.Round(f)))
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + " " + digits[i:]
	}
	return digits
}

func percent(share float64) string { return number(100*share) + " %" }

// position is where Kademlia has a relay or a group: the first 64 bits of the SHA-256 of
// its ID or key. They are enough to tell relays apart.
type position uint64

func newRelays(rng *rand.Rand, n int) []position {
	relays := make([]position, n)
	for i := range relays {
		relays[i] = position(rng.Uint64())
	}
	return relays
}

// keepers returns the numbers of the relays that keep a group's record: those that are
// closest to it, the closest first. A relay that is alone is both.
func keepers(relays []position, group position) (closest [groupRelays]int) {
	first, second := position(math.MaxUint64), position(math.MaxUint64)
	for i, relay := range relays {
		switch d := relay ^ group; {
		case d < first:
			if i > 0 {
				second, closest[1] = first, closest[0]
			}
			first, closest[0] = d, i
		case d < second:
			second, closest[1] = d, i
		}
	}
	return closest
}

// scaleLoad is what one relay has: so many of each.
type scaleLoad struct{ groups, clients, bridges float64 }

// requests returns how many requests there are in a second, and newcomers how many
// connections begin.
func (l scaleLoad) requests() float64 {
	return l.clients*scaleTickRequests/scaleTick.Seconds() + l.newcomers()*scaleFirstRequests
}

func (l scaleLoad) newcomers() float64 { return l.clients * scalePhones / scaleReturn.Seconds() }

// synced returns how many bytes of syncs bridges carry in a second, and bridged how many
// bytes in all. Each comes in and goes out.
func (l scaleLoad) synced() float64 {
	const day = 24 * time.Hour
	return l.bridges * 2 * scaleSync / day.Seconds()
}

func (l scaleLoad) bridged() float64 {
	return l.bridges*scaleBridgeBytes/scaleTick.Seconds() + l.synced()
}

// sent returns how many bytes the relay sends in a second.
func (l scaleLoad) sent() float64 {
	return l.clients*scaleTickBytes/scaleTick.Seconds() + l.bridged()
}

// month returns how many bytes the relay sends in 30 days.
func (l scaleLoad) month() float64 {
	const month = 30 * 24 * time.Hour
	return l.sent() * month.Seconds()
}

// cores returns how many cores are busy.
func (l scaleLoad) cores() float64 {
	return l.clients*scaleConnected.Seconds() + l.requests()*scaleRequest.Seconds() +
		l.newcomers()*scaleNewcomer.Seconds() + l.bridges*scaleBridge.Seconds() + l.synced()/(1<<30)*scaleSyncCPU.Seconds()
}

// scaleCosts prints what a thousand clients of one relay cost it.
func scaleCosts(rng *rand.Rand, t *pageTable) {
	l := simulate(rng, newRelays(rng, 1), 1_000_000)[0]
	l = scaleLoad{l.groups / 1000, l.clients / 1000, l.bridges / 1000}
	connected, requests, newcomers := l.clients*scaleConnected.Seconds(), l.requests()*scaleRequest.Seconds(), l.newcomers()*scaleNewcomer.Seconds()
	t.row("a thousand clients", "how much", "of a core")
	t.row("stay connected", "", percent(connected))
	t.row("ask the DHT", number(l.requests())+" requests a second", percent(requests))
	t.row("connect anew", number(l.newcomers())+" a second", percent(newcomers))
	t.row("use bridges", number(l.bridges)+" bridges", percent(l.cores()-connected-requests-newcomers))
	t.row("all together", "", percent(l.cores()))
	t.row("memory, typical", number(l.clients*clientMemory/(1<<20))+" MiB", "")
	t.row("memory, promised", number(float64(limits{clients: 1000}.memory()-limits{}.memory())/(1<<20))+" MiB", "")
	t.row("traffic, sent in 30 days", fmt.Sprintf("%s TB, %s of it by bridges", number(l.month()/1e12), percent(l.bridged()/l.sent())), "")
}

// scaleShares prints which share of all devices a relay has on average. A device is
// connected to the relays that it knows, to those that keep its group's record, and to
// those that the other devices of its group know, since devices ask each other, too.
func scaleShares(_ *rand.Rand, t *pageTable) {
	t.row("relays", "the devices of a group know the same one", "the same two", "each device any one")
	for _, k := range scaleRelays[1:] {
		elsewhere := func(n float64) float64 { return 1 - n/float64(k) } // the chance that none of n relays is this one
		var far, devices float64                                         // devices whose group knows other relays alone, of all
		for size := 2.0; size <= scaleGroup; size++ {
			far += size * math.Pow(elsewhere(1), size)
			devices += size
		}
		kept := elsewhere(groupRelays)
		t.row(k, percent(1-kept*elsewhere(1)), percent(1-kept*elsewhere(2)), percent(1-kept*far/devices))
	}
}

// simulate places n devices in groups and returns what each relay has. The devices of a
// group know the same relay, which is any. A bridge is on either of the relays that keep
// the group's record.
func simulate(rng *rand.Rand, relays []position, n int) []scaleLoad {
	loads := make([]scaleLoad, len(relays))
	for n > 0 {
		size := min(n, 2+rng.IntN(scaleGroup-1))
		n -= size
		kept := keepers(relays, position(rng.Uint64()))
		for i, k := range kept {
			loads[k].bridges += scaleBridged * float64(size*(size-1)/2) / groupRelays
			if i == 0 || k != kept[0] {
				loads[k].groups++
				loads[k].clients += float64(size)
			}
		}
		if known := rng.IntN(len(relays)); !slices.Contains(kept[:], known) {
			loads[known].clients += float64(size)
		}
	}
	return loads
}

// busiest returns the most that a relay has of each, and the mean.
func busiest(loads []scaleLoad) (most, mean scaleLoad) {
	n := float64(len(loads))
	for _, l := range loads {
		most = scaleLoad{max(most.groups, l.groups), max(most.clients, l.clients), max(most.bridges, l.bridges)}
		mean = scaleLoad{mean.groups + l.groups/n, mean.clients + l.clients/n, mean.bridges + l.bridges/n}
	}
	return most, mean
}

// scaleLoads prints what relays have and do for so many devices.
func scaleLoads(rng *rand.Rand, t *pageTable) {
	t.row("devices", "relays", "clients of a relay, mean", "of the busiest relay: clients", "groups", "requests a second", "cores", "memory, promised", "sent in 30 days")
	for _, size := range []struct {
		devices int
		relays  []int
	}{{10_000, scaleRelays[:4]}, {100_000, scaleRelays[3:]}, {1_000_000, scaleRelays[5:]}} {
		n := float64(size.devices)
		for _, k := range size.relays {
			most, mean := busiest(simulate(rng, typicalRelays(rng, k), size.devices))
			t.row(number(n), k, fmt.Sprintf("%s (%s)", number(mean.clients), percent(mean.clients/n)), number(most.clients), number(most.groups),
				number(most.requests()), number(most.cores()), number(float64(limits{clients: int(most.clients)}.memory())/(1<<30))+" GiB",
				number(most.month()/1e12)+" TB")
		}
	}
}

// full returns how many times the load a machine can take, and what is used up first, by
// its number in scaleResources.
func (m scaleMachine) full(l scaleLoad) (times [3]float64, first int) {
	times = [3]float64{
		float64(clientsFor(uint64(0.85*m.memory))) / l.clients,
		m.cores * scaleBusy / l.cores(),
		m.month / l.month(),
	}
	return times, slices.Index(times[:], slices.Min(times[:]))
}

var scaleResources = [3]string{"`--max-clients`", "CPU", "traffic"}

// scaleAlone prints how many devices fill a machine that is the only relay.
func scaleAlone(rng *rand.Rand, t *pageTable) {
	const n = 100_000
	load := simulate(rng, newRelays(rng, 1), n)[0]
	t.row("one relay with", "is full by "+scaleResources[0], "by "+scaleResources[1], "by "+scaleResources[2], "in typical memory fit")
	for _, m := range scaleMachines {
		times, _ := m.full(load)
		t.row(m.name, number(n*times[0]), number(n*times[1]), number(n*times[2]), number((0.85*m.memory-baseMemory)/clientMemory))
	}
}

// scaleFits prints how many devices several such machines carry until the busiest one is
// full, and of what it is full then.
func scaleFits(rng *rand.Rand, t *pageTable) {
	const n = 100_000
	head := []any{"relays"}
	for _, m := range scaleMachines {
		head = append(head, m.name)
	}
	t.row(head...)
	for _, k := range scaleRelays {
		most, _ := busiest(simulate(rng, typicalRelays(rng, k), n))
		row := []any{k}
		for _, m := range scaleMachines {
			times, first := m.full(most)
			row = append(row, fmt.Sprintf("%s (%s)", number(n*times[first]), scaleResources[first]))
		}
		t.row(row...)
	}
}

// scaleSets is how many times relays are given new IDs to see what these change.
const scaleSets = 200

// scaleEvenness prints how much more the busiest relay has than the mean.
func scaleEvenness(rng *rand.Rand, t *pageTable) {
	t.row("relays", "groups of the busiest ÷ mean: median", "99 %", "clients of the busiest ÷ mean: median", "99 %", "clients of the idlest ÷ mean: median")
	for _, k := range scaleRelays[1:] {
		var groups, clients, idlest []float64
		for range scaleSets {
			kept := keptShares(newRelays(rng, k))
			groups = append(groups, slices.Max(kept)/mean(kept))
			for i := range kept {
				kept[i] = clientShare(kept[i], k)
			}
			clients = append(clients, slices.Max(kept)/mean(kept))
			idlest = append(idlest, slices.Min(kept)/mean(kept))
		}
		t.row(k, quantile(groups, 0.5), quantile(groups, 0.99), quantile(clients, 0.5), quantile(clients, 0.99), quantile(idlest, 0.5))
	}
}

// scaleMoves prints which groups move when relays come and go.
func scaleMoves(rng *rand.Rand, t *pageTable) {
	t.row("relays", "one is added: groups that move", "one fails: groups that move", "clients of the others, after ÷ before, at most: median", "99 %", "two fail at once: groups that lose both")
	for _, k := range scaleRelays[2:] {
		var added, failed, lost, grown []float64
		for range scaleSets {
			more := newRelays(rng, k+1)
			relays, fewer := more[:k], more[1:k]
			added = append(added, movedShare(relays, more))
			failed = append(failed, movedShare(relays, fewer))
			lost = append(lost, groupShare(func(group position) bool { kept := keepers(relays, group); return max(kept[0], kept[1]) == 1 }))
			before, after, most := keptShares(relays)[1:], keptShares(fewer), 0.0
			for i := range after {
				// Devices that knew the one that fails have to know another by then.
				most = max(most, clientShare(after[i], k-1)/clientShare(before[i], k))
			}
			grown = append(grown, most)
		}
		t.row(k, percent(mean(added)), percent(mean(failed)), quantile(grown, 0.5), quantile(grown, 0.99), percent(mean(lost)))
	}
}

// typicalRelays returns relays whose busiest one keeps as many groups as in the median of
// many sets.
func typicalRelays(rng *rand.Rand, n int) []position {
	most := make(map[*position]float64)
	sets := make([][]position, 51)
	for i := range sets {
		sets[i] = newRelays(rng, n)
		most[&sets[i][0]] = slices.Max(keptShares(sets[i]))
	}
	slices.SortFunc(sets, func(a, b []position) int { return cmp.Compare(most[&a[0]], most[&b[0]]) })
	return sets[len(sets)/2]
}

// someGroups is how many groups stand for all. Their first bits are evenly spread, so few
// are enough; the others are mixed (by Knuth's multiplicative hashing).
const someGroups = 1 << 12

// eachGroup calls do with someGroups groups.
func eachGroup(do func(group position)) {
	const step = 1 << 64 / someGroups
	for i := range position(someGroups) {
		do(i*step + i*0x9e3779b97f4a7c15%step)
	}
}

// groupShare returns which share of all groups is so.
func groupShare(is func(group position) bool) (share float64) {
	eachGroup(func(group position) {
		if is(group) {
			share += 1.0 / someGroups
		}
	})
	return share
}

// movedShare returns which share of all groups has a keeper afterwards that it had not
// before.
func movedShare(before, after []position) float64 {
	return groupShare(func(group position) bool {
		had := keepers(before, group)
		for _, i := range keepers(after, group) {
			if after[i] != before[had[0]] && after[i] != before[had[1]] {
				return true
			}
		}
		return false
	})
}

// keptShares returns which share of all groups each of at least two relays keeps.
func keptShares(relays []position) []float64 {
	shares := make([]float64, len(relays))
	eachGroup(func(group position) {
		for _, i := range keepers(relays, group) {
			shares[i] += 1.0 / someGroups
		}
	})
	return shares
}

// clientShare returns which share of all devices is connected to a relay that keeps that
// share of all groups, and is one of so many.
func clientShare(kept float64, relays int) float64 {
	return 1 - (1-kept)*(1-1/float64(relays))
}

func mean(values []float64) (m float64) {
	for _, v := range values {
		m += v / float64(len(values))
	}
	return m
}

// quantile returns the least value that a share q of all is not above.
func quantile(values []float64, q float64) float64 {
	slices.Sort(values)
	return values[int(q*float64(len(values)-1))]
}
