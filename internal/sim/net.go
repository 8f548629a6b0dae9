package sim

import "time"

// Net is a network: when a message arrives, if it does, and how often. The
// links keep the order of messages as TCP does, unless Reorder strikes.
type Net struct {
	Drop, Duplicate, Reorder float64 // probabilities, of each message
	Min, Max                 time.Duration

	rand *Rand
	cut  map[link]bool
	last map[link]time.Duration // arrival of the latest message, in the sender's time
}

type link struct{ from, to uint64 }

// NewNet returns a network without faults whose messages take 0.2 to 2 ms.
func NewNet(r *Rand) *Net {
	return &Net{Min: 200 * time.Microsecond, Max: 2 * time.Millisecond, rand: r, cut: map[link]bool{}, last: map[link]time.Duration{}}
}

// Cut ends, or joins again, one direction between two ends.
func (n *Net) Cut(from, to uint64, cut bool) { n.cut[link{from, to}] = cut }

// IsCut says whether that direction is cut.
func (n *Net) IsCut(from, to uint64) bool { return n.cut[link{from, to}] }

// Heal joins everything again and ends all faults.
func (n *Net) Heal() {
	clear(n.cut)
	n.Drop, n.Duplicate, n.Reorder = 0, 0, 0
	n.Min, n.Max = 200*time.Microsecond, 2*time.Millisecond
}

// Fate is what becomes of a message.
type Fate struct {
	Arrivals             []time.Duration // one for each copy; none: it is lost
	Dropped, Overtakes   bool
	Duplicated, Separate bool // Separate: the link is cut
}

// Route draws the fate of a message that leaves at the time at.
func (n *Net) Route(at time.Duration, from, to uint64) (f Fate) {
	l := link{from, to}
	if f.Separate = n.cut[l]; f.Separate {
		return f
	}
	if f.Dropped = n.rand.Chance(n.Drop); f.Dropped {
		return f
	}
	arrive := at + n.rand.Between(n.Min, n.Max)
	if f.Overtakes = n.rand.Chance(n.Reorder); !f.Overtakes {
		arrive = max(arrive, n.last[l])
		n.last[l] = arrive
	}
	f.Arrivals = append(f.Arrivals, arrive)
	if f.Duplicated = n.rand.Chance(n.Duplicate); f.Duplicated {
		f.Arrivals = append(f.Arrivals, arrive+n.rand.Between(0, 20*n.Max))
	}
	return f
}
